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


def test_replacing_a_batch_leaves_the_others(tmp_path):
    store = spilled(tmp_path)
    for batch in range(BATCHES):
        store[batch] = torch.full((4, 8), float(batch), dtype=torch.bfloat16)
    store[5] = torch.ones(2, 3)
    assert store[5].dtype == torch.float32 and store[5].eq(1).all()
    others = [batch for batch in range(BATCHES) if batch != 5]
    assert all(store[batch].eq(batch).all() and store[batch].shape == (4, 8) for batch in others)


def test_a_store_in_memory_does_not_change_with_what_was_a_view():
    store = Store(1, batch_bytes=64, device=torch.device("cpu"), spill_dir=None)
    whole = torch.zeros(4, 4)
    store[0] = whole[:2]
    whole.fill_(1)
    assert store[0].eq(0).all()
