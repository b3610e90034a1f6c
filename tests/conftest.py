"""Fixtures for every test: one thread, and tiny checkpoints of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_MODELS, build
from transformers import PreTrainedModel

from compresso.checkpoint.reader import Checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models crawl on many threads."""
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(TINY_MODELS))
def family_name(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return request.param


@pytest.fixture(scope="session")
def models() -> Callable[[str], PreTrainedModel]:
    """The tiny model of a family, built once: leave it as it is."""
    built: dict[str, PreTrainedModel] = {}

    def model_of(family: str) -> PreTrainedModel:
        if family not in built:
            built[family] = build(family)
        return built[family]

    return model_of


@pytest.fixture(scope="session")
def checkpoints(
    models: Callable[[str], PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Checkpoint]:
    """The checkpoint of a family's tiny model, saved once: leave its files as they are."""
    saved: dict[str, Path] = {}

    def checkpoint_of(family: str) -> Checkpoint:
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp("tiny") / family
            models(family).save_pretrained(saved[family])
        return Checkpoint(saved[family])

    return checkpoint_of
