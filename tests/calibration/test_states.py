"""States on disk do not stay in memory."""

import mmap
from pathlib import Path

import pytest
import torch

from compresso.calibration.states import Store

BATCHES, ROWS, WIDTH = 24, 1024, 2048
BATCH_BYTES = 4 * ROWS * WIDTH  # 8 MiB; 192 MiB in all


def mapped():
    """Bytes of mapped files that count as memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE


def spilled(tmp_path):
    return Store(BATCHES, batch_bytes=BATCH_BYTES, device=torch.device("cpu"), spill_dir=tmp_path)


@pytest.mark.parametrize("releasing", [True, False])
def test_memory_stays_bounded(tmp_path, monkeypatch, releasing):
    if not releasing:
        monkeypatch.setattr(Store, "release", lambda *_: None)  # the measure can tell
    before = mapped()
    store = spilled(tmp_path)
    most = 0
    for batch in range(BATCHES):
        store[batch] = torch.full((ROWS, WIDTH), float(batch))
        most = max(most, mapped() - before)
    for batch in range(BATCHES):
        assert store[batch].sum() == batch * ROWS * WIDTH
        store.release(batch)
        most = max(most, mapped() - before)
    assert (most < 2 * BATCH_BYTES) == releasing


@pytest.mark.parametrize("on_disk", [True, False])
def test_replacing_a_batch_leaves_the_others(tmp_path, on_disk):
    spill_dir = tmp_path if on_disk else None
    store = Store(7, batch_bytes=5000, device=torch.device("cpu"), spill_dir=spill_dir)
    for batch in range(7):
        store[batch] = torch.full((4, 8), float(batch), dtype=torch.bfloat16)
    store[5] = torch.ones(2, 3).T
    assert store[5].dtype == torch.float32 and torch.equal(store[5], torch.ones(3, 2))
    others = [batch for batch in range(7) if batch != 5]
    assert all(store[batch].eq(batch).all() and store[batch].shape == (4, 8) for batch in others)
    assert (store.ram_bytes > 0) == (not on_disk)


def test_what_is_stored_is_a_copy():
    store = Store(1, batch_bytes=64, device=torch.device("cpu"), spill_dir=None)
    tensor = torch.zeros(4, 4)
    store[0] = tensor
    tensor.fill_(1)
    assert store[0].eq(0).all()
