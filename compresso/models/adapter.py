"""A model whose weights come and go: the only place that runs transformers' model classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError, ResourceError
from compresso.families import Family, family_of
from compresso.models.config import config_of
from compresso.models.modeling_compresso import remove_half
from compresso.models.names import stored_names
from compresso.models.structure import (
    KEY,
    Structure,
    borrowed_linears,
    halves,
    needs_code,
    structure_of,
    without_codes,
)
from compresso.models.substitution import (
    BlockArguments,
    Player,
    Recorder,
    empty_parameter,
    put_parameter,
    replaced,
)

__all__ = ["BlockArguments", "ModelAdapter"]


class ModelAdapter:
    """A model without weights, and the family facts needed to fill and run parts of it.

    Every parameter starts on the meta device and is filled from a checkpoint only while it is
    used. Buffers (rotary tables) are real, as they are computed and not stored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Use `open`. model: without weights."""
        self.model = model
        self.config: PreTrainedConfig = model.config
        self.family: Family = family_of(model.config.model_type)
        self.structure: Structure = structure_of(source.config)
        self.dtype = dtype
        self.device = device
        self.stored = stored_names(model, self.family, source)  # name here -> in the checkpoint
        self._unmapped = sorted(set(source.weight_names()) - set(self.stored.values()))
        self._outside: dict[str, nn.Parameter] = {}  # by name in the checkpoint, while loaded
        self._outside_of = source
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @classmethod
    def open(
        cls,
        source: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> ModelAdapter:
        """Build the model of `source` without its weights, and check that it holds them all.

        dtype:  the type that the model is run in, whatever type the weights are stored in.
        device: where blocks are run.

        Raises ConfigError for an architecture that is not supported, CheckpointError for an
        invalid config.json and for a tensor that is missing or has the wrong shape, ResourceError
        if the installed transformers is too old for it.
        """
        model_type = source.config["model_type"]
        family = family_of(model_type)  # before transformers, which knows other families
        structure_of(source.config)  # transformers would fail anywhere if that is wrong
        try:
            config = config_of(source, trust_remote_code=trust_remote_code)
            if needs_code(source.config):  # linears are filled with decoded weights
                setattr(config, KEY, without_codes(source.config[KEY]))
            # Only parameters: rotary tables on the meta device would be lost.
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code
                )
        except (StrictDataclassError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"`{source.path}` has an invalid config.json: {reason}") from None
        except ImportError as error:
            raise ResourceError(
                f"`{source.path}` cannot be loaded: {error}", hint="pip install -U transformers"
            ) from None
        for field, value in family.requires:
            if getattr(config, field) != value:
                raise ConfigError(
                    f"`{model_type}` with `{field}` {str(getattr(config, field)).lower()} "
                    "is not supported"
                )
        if model.get_input_embeddings().embedding_dim != config.hidden_size:
            raise ConfigError(f"`{model_type}` with projected embeddings is not supported")
        return cls(model.eval().requires_grad_(False), source, dtype=dtype, device=device)

    @property
    def blocks(self) -> nn.ModuleList:
        """All blocks, in order."""
        found = self.model.get_submodule(self.family.blocks)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def count(self) -> int:
        """How many blocks the model has."""
        return len(self.blocks)

    @property
    def blocks_prefix(self) -> str:
        """What the names of all blocks start with in the checkpoint: `model.layers.`."""
        own = f"{self.family.blocks}."
        name = next(name for name in self.stored if name.startswith(own))
        return own.removeprefix(name.removesuffix(self.stored[name]))

    @property
    def tied(self) -> bool:
        """Whether the head has no weights but the embedding's."""
        return f"{self.family.head}.weight" in self.model.all_tied_weights_keys

    @property
    def head_tensor(self) -> str:
        """The name in the checkpoint of the head's weight: the embedding's if that is all."""
        return self.stored[f"{self.family.head}.weight"]

    def block_prefix(self, index: int) -> str:
        """What the tensors of block `index` start with in the checkpoint: `model.layers.0.`."""
        return f"{self.blocks_prefix}{index}."

    def module_prefix(self, index: int) -> str:
        """What the modules of block `index` start with in transformers: `model.layers.0.`."""
        return f"{self.family.blocks}.{index}."

    def block_tensors(self, index: int) -> list[str]:
        """Names in the checkpoint of the dense tensors of block `index`, in the model's order.

        Linears that it uses, but that another block has, are not among them.
        """
        own = self.module_prefix(index)
        return [stored for name, stored in self.stored.items() if name.startswith(own)]

    def outside_tensors(self) -> list[str]:
        """Names in the checkpoint of all other dense tensors of the model, each once."""
        blocks = f"{self.family.blocks}."
        names = [stored for name, stored in self.stored.items() if not name.startswith(blocks)]
        return list(dict.fromkeys(names))

    def unmapped_tensors(self) -> list[str]:
        """Names of tensors in the checkpoint that the model has no place for, sorted."""
        return self._unmapped

    def remove(self, sub_blocks: Iterable[int]) -> None:
        """Let the model lack these sub-blocks from now on: it neither runs nor asks for them.

        sub_blocks: 2 i is the attention of block i, 2 i + 1 its MLP.

        Raises ConfigError if another block uses linears of one of them.
        """
        gone = sorted(set(sub_blocks))
        self.structure = self.structure.without(gone)
        for sub_block in gone:
            block, mlp = divmod(sub_block, 2)
            half = halves(self.family)[mlp]
            remove_half(
                self.blocks[block], modules=half.modules, norms=half.norms, attention=not mlp
            )
        left = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self.stored = {name: stored for name, stored in self.stored.items() if name in left}

    def load_block(
        self, index: int, source: Checkpoint, tensors: Mapping[str, Tensor] | None = None
    ) -> nn.Module:
        """Fill block `index`, in the adapter's type and on its device.

        Linears that it uses and another block has are filled in that block.

        tensors: dense tensors by name in the checkpoint, used instead of those of `source`;
                 further ones are ignored. Not modified.
        """
        given = tensors or {}
        names = self._names_used(index)
        weights = source.load_weights(stored for stored in names.values() if stored not in given)
        for name, stored in names.items():
            weight = given[stored] if stored in given else weights[stored]
            put_parameter(self.model, name, weight.to(self.device, self.dtype))
        return self.blocks[index]

    def unload_block(self, index: int) -> None:
        """Free the weights that `load_block` filled."""
        for name in self._names_used(index):
            empty_parameter(self.model, name)

    def unload_outside(self) -> None:
        """Free the weights that `enter` and `logits` loaded."""
        self._outside.clear()
        for name in self.stored:
            if not name.startswith(f"{self.family.blocks}."):
                empty_parameter(self.model, name)

    def weight(self, block: nn.Module, path: str) -> Tensor:
        """A linear's weight, (out, in), whichever way round it is stored. Not a copy."""
        weight = block.get_parameter(f"{path}.weight")
        return weight.T if self.family.transposed else weight

    def set_weight(self, block: nn.Module, path: str, weight: Tensor) -> None:
        """Replace a linear's weight by a copy of `weight`, (out, in)."""
        if weight.shape != self.weight(block, path).shape:
            raise ValueError(f"{path} cannot take a weight of shape {tuple(weight.shape)}")
        turned = weight.T if self.family.transposed else weight
        copied = turned.to(self.device, self.dtype, copy=True).contiguous()
        put_parameter(block, f"{path}.weight", copied)

    def set_head(self, weight: Tensor) -> None:
        """Replace the weight of the head by a copy of `weight`, (vocabulary, d), for `logits`."""
        if self.tied:
            raise ValueError("a tied head has no weight of its own")
        copied = nn.Parameter(weight.to(self.device, self.dtype, copy=True), requires_grad=False)
        self._outside[self.head_tensor] = copied

    def enter(self, source: Checkpoint, tokens: Tensor) -> tuple[Tensor, list[BlockArguments]]:
        """Run everything before the blocks.

        tokens: ids, (B, T) int64.

        Returns the hidden states entering block 0, (B, T, d), and what the model passes to each
        block besides. The arguments depend on the shape of `tokens` alone, as nothing is padded.
        """
        self._load_outside(source, without=(self.family.head, self.family.final_norm))
        recorders = [Recorder() for _ in self.blocks]
        standing_in = {f"{self.family.blocks}.{i}": r for i, r in enumerate(recorders)}
        with replaced(self.model, {**standing_in, self.family.final_norm: nn.Identity()}):
            body = self.model.get_submodule(self.family.body)
            body(tokens.to(self.device), use_cache=False)
        return recorders[0].hidden, [recorder.arguments for recorder in recorders]

    def logits(self, source: Checkpoint, hidden: Tensor) -> Tensor:
        """The model's own scores of the next token, (B, T, vocabulary) float32.

        hidden: what the last block returns, (B, T, d). Not modified.
        """
        return self._leave(source, hidden, {}).float()

    def head_input(self, source: Checkpoint, hidden: Tensor) -> Tensor:
        """What the head reads, (B, T, d), of what the last block returns, (B, T, d)."""
        recorder = Recorder()
        self._leave(source, hidden, {self.family.head: recorder})
        return recorder.hidden

    def _leave(
        self, source: Checkpoint, hidden: Tensor, standing_in: dict[str, nn.Module]
    ) -> Tensor:
        """Run everything after the blocks, with other modules for some of it."""
        self._load_outside(source, without=(self.family.embedding, *standing_in))
        hidden = hidden.to(self.device, self.dtype)
        # The model's own forward with nothing left of its blocks applies the final norm, the
        # head, soft caps and multipliers exactly as it does otherwise.
        blocks = {f"{self.family.blocks}.{i}": Player(hidden) for i in range(self.count)}
        with replaced(self.model, {**blocks, **standing_in}):
            scores: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        return scores

    def _names_used(self, index: int) -> dict[str, str]:
        """Name in the model -> name in the checkpoint, of all parameters that a block uses."""
        used = [self.module_prefix(index)]
        for path in borrowed_linears(self.family, self.structure, index):
            used += [f"{self.family.blocks}.{path}.{name}" for name in ("weight", "bias")]
        return {n: stored for n, stored in self.stored.items() if n.startswith(tuple(used))}

    def _load_outside(self, source: Checkpoint, *, without: tuple[str, ...]) -> None:
        if source is not self._outside_of:
            self.unload_outside()
            self._outside_of = source
        skipped = tuple(f"{path}." for path in (self.family.blocks, *without))
        wanted = {n: stored for n, stored in self.stored.items() if not n.startswith(skipped)}
        missing = dict.fromkeys(s for s in wanted.values() if s not in self._outside)
        for stored, tensor in source.load_weights(missing).items():
            self._outside[stored] = nn.Parameter(tensor.to(self.device, self.dtype), False)
        for name, stored in wanted.items():
            put_parameter(self.model, name, self._outside[stored])  # a tied pair shares one tensor
