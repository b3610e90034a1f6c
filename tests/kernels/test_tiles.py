"""Work on tiles is the same on one thread and on several, and what fails in one is raised."""

import pytest
import torch

from compresso.kernels.grid import quantize
from compresso.kernels.packing import pack_rows, unpack_rows
from compresso.kernels.tiles import CPU_TILE, on_each, row_tiles


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_tiles_cover_the_rows_and_fit():
    matrix = torch.empty(1000, 1024)
    tiles = row_tiles(matrix)
    assert torch.equal(torch.cat([torch.arange(1000)[tile] for tile in tiles]), torch.arange(1000))
    assert all(matrix[tile].numel() <= CPU_TILE for tile in tiles)


def test_a_row_longer_than_a_tile_is_a_tile():
    assert len(row_tiles(torch.empty(3, 2 * CPU_TILE))) == 3


def test_codes_do_not_depend_on_threads(two_threads):
    torch.manual_seed(0)
    weight = torch.randn(512, 1024)
    options = {"bits": 3, "group_size": 64, "symmetric": False, "grid": "mse"}

    def run():
        packed = quantize(weight, scale_dtype=torch.bfloat16, **options)
        words = pack_rows(packed.codes, 3)
        return packed, words, unpack_rows(words, 3, 1024), packed.decode()

    several = run()
    torch.set_num_threads(1)
    alone = run()
    assert torch.equal(several[0].codes, alone[0].codes)
    assert torch.equal(several[0].grid.scale, alone[0].grid.scale)
    for one, other in zip(several[1:], alone[1:], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(alone[2], alone[0].codes)


def test_threads_work_alone_and_leave_the_others_as_they_were(two_threads):
    seen = []

    def work(_):
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))

    on_each(work, range(4), torch.device("cpu"))

    assert seen == [(1, False)] * 4
    assert torch.get_num_threads() == 2


def test_raises_what_a_tile_raises(two_threads):
    def work(tile):
        if tile == 2:
            raise ValueError("tile 2")

    with pytest.raises(ValueError, match="tile 2"):
        on_each(work, range(4), torch.device("cpu"))
    assert torch.get_num_threads() == 2
