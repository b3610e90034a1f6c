"""Write a GGUF file tensor by tensor, and say in it what llama.cpp has to know."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from compresso.checkpoint.directory import read_json
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError, ResourceError
from compresso.formats.gguf_families import Plan
from compresso.formats.gguf_tensors import Encoded
from compresso.formats.gguf_types import gguf_package
from compresso.formats.gguf_vocabulary import Vocabulary, read_vocabulary, tokenizer_json
from compresso.models.tokenizer import Tokenizer

ALIGNMENT = 32
ROPE_FACTORS = "rope_freqs.weight"
# Fields of yarn -> what llama.cpp takes them to be, whatever a file says, in the families here.
YARN = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True}


class GgufFile:
    """Takes tensors one after another; the header comes first in the file, so it is written last.

    Use it as a context manager: what it keeps meanwhile is deleted at the end.
    """

    def __init__(self, path: Path, arch: str) -> None:
        """path: of the file, which does not exist yet. arch: as llama.cpp calls it."""
        self.path = path
        self.header = gguf_package().GGUFWriter(path, arch)
        self._scratch_path = path.with_name(f"{path.name}.data")
        self._scratch = self._scratch_path.open("wb")

    def add(self, tensor: Encoded) -> None:
        """Keep a tensor; its bytes need not stay in memory.

        Raises ResourceError if the disk is full.
        """
        gguf = gguf_package()
        kind = gguf.GGMLQuantizationType[tensor.type.upper()]
        data = np.ascontiguousarray(tensor.data)
        self.header.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), data.nbytes, raw_dtype=kind
        )
        with _writing(self.path):
            self._scratch.write(data.tobytes())
            self._scratch.write(bytes(-data.nbytes % ALIGNMENT))

    def finish(self) -> None:
        """Write the file. Raises ResourceError if the disk is full."""
        with _writing(self.path):
            self._scratch.close()
            self.header.write_header_to_file()
            self.header.write_kv_data_to_file()
            self.header.write_ti_data_to_file()
            self.header.close()
            with self.path.open("ab") as file, self._scratch_path.open("rb") as data:
                file.write(bytes(-file.tell() % ALIGNMENT))
                shutil.copyfileobj(data, file, 2**24)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._scratch.close()
        self._scratch_path.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot write `{path}`: {error.strerror}",
            hint="make room, or give access, and run the same command again",
        ) from error


def describe_model(file: GgufFile, plan: Plan, config: Any, source: Checkpoint) -> None:
    """Say what the model is. config: that of transformers."""
    gguf, header = gguf_package(), file.header
    metadata = gguf.Metadata.load(None, source.path, None, source.parameters)
    metadata.name = metadata.name or source.path.name
    metadata.set_gguf_meta_model(header)
    header.add_quantization_version(gguf.GGML_QUANT_VERSION)
    header.add_vocab_size(config.vocab_size)
    header.add_context_length(plan.context)
    header.add_embedding_length(config.hidden_size)
    header.add_block_count(len(plan.blocks))
    header.add_head_count(_one(plan.heads))
    header.add_head_count_kv(_one(plan.key_heads))
    header.add_feed_forward_length(_one(plan.widths))
    header.add_layer_norm_rms_eps(config.rms_norm_eps)
    header.add_key_length(plan.head_size)
    header.add_value_length(plan.head_size)
    header.add_rope_dimension_count(plan.head_size)
    if plan.arch == "gemma2":
        header.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if plan.arch.startswith("gemma") and getattr(config, "final_logit_softcapping", None):
        header.add_final_logit_softcapping(config.final_logit_softcapping)
    if plan.window is not None:
        header.add_sliding_window(plan.window)
        period = {"gemma2": 2, "gemma3": 6}[plan.arch]
        usual = [place % period < period - 1 for place in range(len(plan.blocks))]
        if plan.windowed != usual:
            header.add_sliding_window_pattern(plan.windowed)


def describe_rope(file: GgufFile, plan: Plan, config: Any, frequencies: Tensor | None) -> None:
    """Say how positions are rotated.

    frequencies: of the model's rotary embedding in blocks without a window; None if not known.

    Raises ConfigError for a way that llama.cpp does not have.
    """
    gguf, header = gguf_package(), file.header
    rope: dict[str, Any] = config.rope_parameters
    if "full_attention" in rope:
        local, rope = rope.get("sliding_attention", {}), rope["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise ConfigError("llama.cpp cannot scale the rotation in blocks with a window")
        header.add_rope_freq_base_swa(local.get("rope_theta", 10000.0))
    header.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        header.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        header.add_rope_scaling_factor(rope["factor"])
    # llama.cpp rotates all blocks by yarn, those with a window included.
    elif kind == "yarn" and plan.arch != "gemma3":
        _check_yarn(rope, plan)
        header.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        header.add_rope_scaling_factor(rope["factor"])
        old = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        header.add_rope_scaling_orig_ctx_len(old)
        _yarn(header, rope)
    elif kind == "llama3" and frequencies is not None and plan.family.permuted:
        steps = torch.arange(0, plan.head_size, 2, dtype=torch.float64) / plan.head_size
        factors = (rope["rope_theta"] ** -steps / frequencies.double()).float()
        file.add(Encoded(ROPE_FACTORS, "f32", tuple(factors.shape), factors.numpy(), "kept"))
    elif kind != "default":
        raise ConfigError(f"llama.cpp cannot rotate as `rope_type` `{kind}` does in `{plan.arch}`")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"llama.cpp rotates whole heads in `{plan.arch}`, this model a part")


def _check_yarn(rope: dict[str, Any], plan: Plan) -> None:
    for field, known in YARN.items():
        if rope.get(field) not in (None, known):
            raise ConfigError(
                f"llama.cpp takes `{field}` of `rope_type` `yarn` to be {known} in `{plan.arch}`,"
                f" but it is {rope[field]}"
            )


def _yarn(header: Any, rope: dict[str, Any]) -> None:
    """What llama.cpp multiplies the scale that it takes from the factor by."""
    usual = 0.1 * math.log(rope["factor"]) + 1.0
    header.add_rope_scaling_attn_factors((rope.get("attention_factor") or usual) / usual)


def describe_tokens(
    file: GgufFile, source: Checkpoint, size: int, *, pre: str | None, trust_remote_code: bool
) -> None:
    """Say how text becomes tokens, with the chat template.

    size: tokens of the model. Raises CheckpointError if there is no tokenizer, or llama.cpp has
    none like it.
    """
    gguf, header = gguf_package(), file.header
    tokenizer = Tokenizer.open(source, trust_remote_code=trust_remote_code)
    found: Vocabulary = read_vocabulary(tokenizer_json(tokenizer.inner), size, pre=pre)
    header.add_tokenizer_model(found.model)
    header.add_tokenizer_pre(found.pre)
    header.add_token_list(found.tokens)
    if found.scores:
        header.add_token_scores(found.scores)
    header.add_token_types(found.types)
    if found.space_prefix is not None:
        header.add_add_space_prefix(found.space_prefix)
    special = gguf.SpecialVocab(source.path, n_vocab=size)
    special.merges = found.merges
    plain, around = (tokenizer.encode("a", special=flag) for flag in (False, True))
    first, last = tokenizer.inner.bos_token_id, tokenizer.inner.eos_token_id
    special.add_special_token["bos"] = around == [first, *plain] or around == [first, *plain, last]
    special.add_special_token["eos"] = around[len(around) - 1 :] == [last] != plain[-1:]
    more = [token for token in _ends(source) if token != last]
    if more:
        special.special_token_ids.setdefault("eot", more[0])
    template = getattr(tokenizer.inner, "chat_template", None)
    if isinstance(template, str):
        special.chat_template = template
    special.add_to_gguf(header, quiet=True)


def _ends(source: Checkpoint) -> list[int]:
    """The tokens that end a text, of which an instructed model has several."""
    path = source.path / "generation_config.json"
    given = read_json(path).get("eos_token_id") if path.is_file() else None
    given = given or source.config.get("eos_token_id")
    return list(given) if isinstance(given, list) else []


def describe_no_tokens(file: GgufFile) -> None:
    """Say that the file takes token ids alone."""
    file.header.add_tokenizer_model("no_vocab")


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
