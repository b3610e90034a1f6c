"""The config of a checkpoint's model, as transformers has it."""

from __future__ import annotations

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from compresso.checkpoint.directory import CONFIG, read_json
from compresso.checkpoint.reader import Checkpoint


def config_of(source: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """That of a checkpoint; or of a view of one, which may have another than is on the disk.

    Raises what transformers raises if it is invalid.
    """
    if source.config == read_json(source.path / CONFIG):
        return AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    return CONFIG_MAPPING[source.config["model_type"]].from_dict(dict(source.config))
