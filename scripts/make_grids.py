"""Compute the grids that HIGGS rounds to, and write `compresso/kernels/vector_grids.json`.

    python scripts/make_grids.py [--out FILE]

A grid of n points in p dimensions is one that a standard normal vector is nearest to on average.
For p = 1 that is the Lloyd-Max quantizer, solved to machine precision by Newton's method. For
p > 1 there is no formula and there are many local minima, so several starts are each trained by
competitive learning (CLVQ, in batches) and then by Lloyd's algorithm, and the best is polished by
Lloyd on more samples. "mse" is the mean squared error per dimension: exact for p = 1, else over
samples that the points were not fitted to. Takes about five minutes on one core; every draw is
seeded.

Source: Pages and Printems, "Optimal quadratic quantization for numerics: the Gaussian case",
2003; Malinovskii et al., HIGGS, arXiv:2411.17525.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LINE_SIZES = (4, 8, 16, 256)
CHUNK = 4096  # vectors scored at once, so that the scores stay in the cache
TEST_SAMPLES = 2**22


@dataclass(frozen=True)
class Plan:
    """How much work one grid gets."""

    dimension: int
    size: int
    starts: int
    batches: int
    samples: int


PLANS = (
    Plan(2, 16, starts=24, batches=300, samples=2**17),
    Plan(2, 64, starts=10, batches=300, samples=2**18),
    Plan(2, 256, starts=5, batches=300, samples=2**19),
    Plan(4, 256, starts=4, batches=300, samples=2**19),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    package = Path(__file__).resolve().parents[1] / "compresso"
    parser.add_argument("--out", type=Path, default=package / "kernels" / "vector_grids.json")
    options = parser.parse_args()
    grids = {}
    for size in LINE_SIZES:
        points, mse = lloyd_max(size)
        grids[f"p1n{size}"] = record(points[:, None], mse)
    for plan in PLANS:
        points, mse = best_of(plan)
        grids[f"p{plan.dimension}n{plan.size}"] = record(points, mse)
    lines = [f'  "{name}": {json.dumps(grid)}' for name, grid in grids.items()]
    options.out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def record(points: Tensor, mse: float) -> dict[str, object]:
    """One entry of the file; six decimals are a thousandth of the distance between points."""
    print(f"{tuple(points.shape)}: {mse:.3e} per dimension", flush=True)
    order = sorted(range(len(points)), key=lambda index: points[index].tolist())
    rounded = [[round(value, 6) for value in points[index].tolist()] for index in order]
    return {"mse": float(f"{mse:.5g}"), "points": rounded}


def lloyd_max(size: int) -> tuple[Tensor, float]:
    """The best `size` points for a standard normal number, and their mean squared error.

    At the optimum every point is the mean of its cell; Newton finds it from the density that is
    right for many points, that of a normal of variance 3.
    """
    share = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    points = torch.special.ndtri(share) * math.sqrt(3)
    for _ in range(8):  # five reach machine precision
        jacobian = torch.func.jacfwd(_cell_means)(points) - torch.eye(size, dtype=torch.float64)
        points = points + torch.linalg.solve(jacobian, points - _cell_means(points))
    mass = _mass(points)
    return points, (1 - (mass * points.square()).sum()).item()


def _edges(points: Tensor) -> Tensor:
    infinity = points.new_full((1,), math.inf)
    return torch.cat((-infinity, (points[1:] + points[:-1]) / 2, infinity))


def _mass(points: Tensor) -> Tensor:
    edges = _edges(points)
    upper = edges[1:] > 0  # differences of the smaller tail, which keeps the digits
    return torch.where(
        upper,
        torch.special.ndtr(-edges[:-1]) - torch.special.ndtr(-edges[1:]),
        torch.special.ndtr(edges[1:]) - torch.special.ndtr(edges[:-1]),
    )


def _cell_means(points: Tensor) -> Tensor:
    middles = (points[1:] + points[:-1]) / 2
    density = torch.exp(-middles.square() / 2) / math.sqrt(2 * math.pi)
    none = points.new_zeros(1)
    density = torch.cat((none, density, none))
    return (density[:-1] - density[1:]) / _mass(points)


def best_of(plan: Plan) -> tuple[Tensor, float]:
    """The best of several starts, and its error on samples of its own."""
    generator = torch.Generator().manual_seed(plan.dimension * 1000 + plan.size)
    common = torch.randn(plan.samples, plan.dimension, generator=generator)
    found = [learn(plan, common, generator) for _ in range(plan.starts)]
    points = min(found, key=lambda points: error(points, common))
    samples = torch.randn(8 * plan.samples, plan.dimension, generator=generator)
    for _ in range(12):
        points = cell_means(points, samples)[1]
    return points, error(points, torch.randn(TEST_SAMPLES, plan.dimension, generator=generator))


def learn(plan: Plan, samples: Tensor, generator: torch.Generator) -> Tensor:
    """Competitive learning on fresh batches with falling steps, then Lloyd's algorithm."""
    spread = math.sqrt((plan.dimension + 2) / plan.dimension)  # of the density for many points
    points = spread * torch.randn(plan.size, plan.dimension, generator=generator)
    for number in range(plan.batches):
        batch = torch.randn(64 * plan.size, plan.dimension, generator=generator)
        count, means = cell_means(points, batch)
        step = (count / (count + 20))[:, None] / (1 + 0.03 * number)
        points = points + step * (means - points)
    for _ in range(40):
        points = cell_means(points, samples)[1]
    return points


def cell_means(points: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """How many samples are nearest to each point, and their mean (the point itself if none)."""
    codes = nearest(points, samples)
    count = torch.bincount(codes, minlength=len(points)).float()
    sums = torch.zeros_like(points).index_add_(0, codes, samples)
    return count, torch.where(count[:, None] > 0, sums / count[:, None].clamp(min=1), points)


def error(points: Tensor, samples: Tensor) -> float:
    return (samples - points[nearest(points, samples)]).double().square().mean().item()


def nearest(points: Tensor, samples: Tensor) -> Tensor:
    """The plain scan: grids are made without the search that they are later used with."""
    bias = points.square().sum(1) / -2
    parts = [torch.addmm(bias, part, points.t()).max(1).indices for part in samples.split(CHUNK)]
    return torch.cat(parts)


if __name__ == "__main__":
    main()
