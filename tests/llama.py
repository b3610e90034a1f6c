"""What llama.cpp says of a file, in this process: to start one for every test takes longer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from compresso.runtimes.llama_cpp_model import Model


def said(path: Path, tokens: Tensor, *, at_once: bool = True) -> Tensor:
    """Its logits, (1, T, vocabulary). at_once: of all tokens together, or one after another."""
    (file,) = path.glob("model*.gguf")
    model = Model(str(file), [str(lora) for lora in path.glob("lora*.gguf")])
    ids = tokens[0].tolist()
    model.make_room(len(ids), 1, exact=True)
    if at_once:
        return model.run(ids, 0, every=True)[None]
    rows = [model.run([token], place) for place, token in enumerate(ids)]
    return torch.cat(rows)[None]


@torch.no_grad()
def difference(path: Path, model: nn.Module, tokens: Tensor) -> float:
    """How far it is off at most, as a share of the largest logit."""
    expected = model(input_ids=tokens).logits.float()
    found = said(path, tokens)
    return float((found - expected).abs().max() / expected.abs().max())
