"""Proof that a checkpoint is what it was in memory: reload it from its path alone and compare."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from compresso.checkpoint.directory import ADAPTER, ADAPTER_WEIGHTS, has_adapter, read_shard
from compresso.checkpoint.reload import blaming, quiet, reload, with_adapter
from compresso.errors import GateError

# Largest difference allowed, as a share of the largest logit. What the type's rounding can add up
# to over the blocks; a wrong weight or a shifted block is far above it.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# The same for kernels of bitsandbytes, which round what they multiply, by what turns them on.
KERNELS = {"load_in_4bit": 0.04, "load_in_8bit": 0.08}
TOP = 8  # logits recorded per position
PROMPT = 64  # most tokens continued; without a cache, every one is run again for each new one
NEW_TOKENS = 16


@dataclass(frozen=True)
class Fingerprint:
    """What a model says about some tokens.

    tokens: (1, T) int64. logits: (1, T, V) float32; -inf where they were not recorded.
    dtype:     type the model computed in, if it is known.
    tolerance: share of the largest logit that the model may be off by where it will run; None for
               what rounding in `dtype` comes to.
    """

    tokens: Tensor
    logits: Tensor
    dtype: torch.dtype | None = None
    tolerance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values: the tokens and, of each position, the 8 highest logits."""
        top = self.logits[0].topk(min(TOP, self.logits.shape[-1]))
        values = {
            "tokens": self.tokens[0].tolist(),
            "vocabulary": self.logits.shape[-1],
            "top_tokens": top.indices.tolist(),
            "top_logits": [[round(value, 5) for value in row] for row in top.values.tolist()],
        }
        if self.dtype is not None:
            values["dtype"] = str(self.dtype).removeprefix("torch.")
        return values if self.tolerance is None else {**values, "tolerance": self.tolerance}

    def up_to(self, longest: int | None) -> Self:
        """The same of the first `longest` tokens; of all for None."""
        return replace(self, tokens=self.tokens[:, :longest], logits=self.logits[:, :longest])

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`, but for the logits that it leaves out."""
        tokens = torch.tensor(values["tokens"])
        logits = torch.full((len(tokens), values["vocabulary"]), -torch.inf)
        indices = torch.tensor(values["top_tokens"])
        logits.scatter_(1, indices, torch.tensor(values["top_logits"]))
        dtype = getattr(torch, values["dtype"]) if "dtype" in values else None
        return cls(tokens[None], logits[None], dtype, values.get("tolerance"))


@dataclass(frozen=True)
class ProofReport:
    """What the comparison of a reloaded checkpoint found.

    difference: largest absolute difference of a logit. tolerance: the largest allowed.
    top_agreement: share of positions with the same most likely token.
    cache_difference: largest absolute difference of a logit generated with and without a cache.
    generated: tokens generated both ways before a near-tie, if any, ended the comparison. Both are
               None for a model that was run block by block, which cannot generate.
    adapter:   what added the corrections of an adapter: `peft`, or `compresso`; None without one.
    """

    difference: float
    tolerance: float
    top_agreement: float
    cache_difference: float | None = None
    generated: int | None = None
    adapter: str | None = None


def prove(
    path: Path,
    fingerprint: Fingerprint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    carried: Collection[str] = (),
    tolerance: float | None = None,
) -> ProofReport:
    """Reload a checkpoint with plain transformers and compare it with the model in memory.

    An adapter beside it is put on by plain PEFT.

    The code that comes with restructured checkpoints needs no trust: importing compresso.models
    has made transformers know its classes.

    The whole model is in memory while it lasts, in `dtype`.

    path:        the checkpoint's directory.
    fingerprint: what the model in memory said. Not modified.
    dtype:       type the model in memory computed in; the reloaded weights are cast to it.
    carried:     stored tensors that no module takes, and that the source had as well.
    tolerance:   share of the largest logit; that of the type, or of kernels known, if not given.

    Raises GateError if it does not load, a tensor is missing, left over or of the wrong shape, a
    logit differs by more than the type's tolerance, or generating with a cache differs from
    generating without; ResourceError if transformers needs a package that is not installed.
    """
    with quiet(), blaming(path), torch.no_grad():
        model = reload(path, carried, trust_remote_code=trust_remote_code)
        tolerance = tolerance or max(TOLERANCE[dtype], *_kernels(model))
        if corrected := has_adapter(path):
            model = with_adapter(model, path)
            _check_factors(model, path / ADAPTER)
        model(input_ids=fingerprint.tokens[:, :1])  # what is decoded then, is in its own type
        for name, parameter in model.named_parameters():  # not buffers: rotary tables stay float32
            if parameter.is_floating_point() and ".lora_" not in name:  # nor what PEFT has cast
                parameter.data = parameter.data.to(dtype)
        if model.device != torch.device(device):
            model.to(device)
        tokens = fingerprint.tokens.to(device)
        logits = model.eval()(input_ids=tokens).logits.float().cpu()
        found = compare(path, logits, fingerprint, tolerance)
        generated, cache_difference = _generate(path, model, tokens, tolerance)
    found = replace(found, generated=generated, cache_difference=cache_difference)
    return replace(found, adapter="peft") if corrected else found


def _check_factors(model: Any, folder: Path) -> None:
    """Raises GateError if PEFT took in other factors than are stored."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = read_shard(folder / ADAPTER_WEIGHTS, hint="write it again")
    for name in sorted({*stored, *loaded}):
        pair = [found[name].float().cpu() for found in (stored, loaded) if name in found]
        if len(pair) < 2 or not torch.equal(*pair):
            raise GateError(f"`{folder}` does not load as it is: PEFT has another `{name}`")


def _kernels(model: Any) -> list[float]:
    """The tolerances that the kernels of a model's packed linears ask for."""
    entry = getattr(model.config, "quantization_config", None)
    return [0.0, *(limit for flag, limit in KERNELS.items() if getattr(entry, flag, False))]


def compare(path: Path, logits: Tensor, fingerprint: Fingerprint, tolerance: float) -> ProofReport:
    """Hold what a reloaded checkpoint says against what the model in memory said.

    logits:    (1, T, V) float32.
    tolerance: share of the largest logit: that in `TOLERANCE` of the type both were computed in.

    Raises GateError if a logit differs by more than that.
    """
    expected = fingerprint.logits.cpu()
    if logits.shape != expected.shape:
        raise GateError(
            f"`{path}` gives logits of shape {tuple(logits.shape)}, not {tuple(expected.shape)}"
        )
    recorded = expected != -torch.inf
    difference = float((logits - expected)[recorded].abs().max())
    limit = tolerance * max(1.0, float(expected[recorded].abs().max()))
    if not difference <= limit:  # so that NaN fails
        raise GateError(
            f"`{path}` is not the model it was in memory: logits differ by up to {difference:.3g} "
            f"(limit {limit:.3g})"
        )
    agree = logits.argmax(-1) == expected.argmax(-1)
    return ProofReport(difference, limit, float(agree.float().mean()))


def _generate(path: Path, model: Any, tokens: Tensor, tolerance: float) -> tuple[int, float]:
    """Continue the tokens greedily with and without a cache.

    Returns how many tokens could be compared and the largest difference of a logit. Where the
    logits agree and the tokens do not, the two highest are nearly tied; the continuations differ
    from there on, and are compared up to there.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = (longest or PROMPT + NEW_TOKENS) - NEW_TOKENS
    prompt = tokens[:, : max(1, min(PROMPT, room))]
    cached, uncached = (_continue(model, prompt, use_cache=cache) for cache in (True, False))
    worst = 0.0
    for step in range(NEW_TOKENS):
        one, other = cached.logits[step].float(), uncached.logits[step].float()
        limit = tolerance * max(1.0, float(other.abs().max()))
        difference = float((one - other).abs().max())
        if not difference <= limit:
            raise GateError(
                f"`{path}` generates otherwise with a cache than without: at new token {step + 1} "
                f"logits differ by up to {difference:.3g} (limit {limit:.3g})"
            )
        worst = max(worst, difference)
        if one.argmax() != other.argmax():
            return step, worst
    return NEW_TOKENS, worst


def _continue(model: Any, prompt: Tensor, *, use_cache: bool) -> Any:
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    # generate() fills gaps from the model's own, whose stop tokens would end the text early.
    model.generation_config = settings
    mask = torch.ones_like(prompt)
    return model.generate(prompt, generation_config=settings, attention_mask=mask)
