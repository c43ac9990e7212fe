"""Errors of the discretisations over the number of steps, and steps over the tolerance asked for.

    python benchmarks/convergence.py      docs/results/convergence.json and .png, in a quarter of a minute on one core

The left panel steps a driver whose rows turn smoothly (rank 2, K = 4, V = 3, scalar decay; vector decay for the
splittings) over one unit of time, against 16,384 steps of Magnus-4 (Strang's of `exact` for the vector decay). The
right panel asks `paths.refine` for a tolerance, on rates that swing in a fiftieth of the time.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

import parallelflow as pf
from parallelflow import Discretization, DriverSource, Factor, LowRankDriver, Row, paths

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "convergence.json"
RANK, KEY, VALUE = 2, 4, 3
COUNTS = (4, 8, 16, 32, 64, 128, 256, 512)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
SCHEMES: dict[str, tuple[str, Discretization]] = {
    "euler": ("scalar", Discretization("euler")),
    "backward_euler": ("scalar", Discretization("backward_euler")),
    "cayley": ("scalar", Discretization("cayley")),
    "rk4": ("scalar", Discretization("rk4")),
    "exact": ("scalar", Discretization("exact")),
    "exact, left point": ("scalar", Discretization("exact", node="left")),
    "exact, Lie": ("vector", Discretization("exact", splitting="lie")),
    "exact, Strang": ("vector", Discretization("exact", splitting="strang")),
    "magnus4": ("scalar", Discretization("magnus4")),
}


class Smooth:
    """A smooth random function of time with values of a shape."""

    def __init__(self, *shape: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.constant, self.sine, self.cosine = torch.randn(3, *shape, generator=generator, dtype=torch.float64) / 2

    def __call__(self, time: Tensor) -> Tensor:
        time = time.reshape(1, -1, *(1 for _ in self.constant.shape))
        return self.constant + self.sine * torch.sin(2 * time) + self.cosine * torch.cos(3 * time)


READ, WRITE, VALUES = (Smooth(RANK, 1, width, seed=n) for n, width in ((1, KEY), (2, KEY), (3, VALUE)))
DECAY = {"scalar": Smooth(1, seed=4), "vector": Smooth(1, KEY, seed=5)}
STATE = torch.randn(1, 1, KEY, VALUE, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def smooth(decay: str, steps: int) -> DriverSource:
    def rates(time: Tensor) -> LowRankDriver:
        rows = (Row(WRITE(time), Factor(READ(time)), Factor(VALUES(time))),)
        return LowRankDriver(rows, -0.3 - DECAY[decay](time).square())

    return DriverSource(rates, torch.linspace(0, 1, steps + 1, dtype=torch.float64))


def quick(steps: int = 32) -> DriverSource:
    """A path of three channels, one of which swings in a fiftieth of the time."""
    draw = lambda *shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double() / 2  # noqa: E731
    field = paths.LinearField(draw(3, 1, 1, KEY, seed=1), draw(3, 1, 1, KEY, seed=2), draw(3, 1, 1, VALUE, seed=3))

    def rates(time: Tensor) -> LowRankDriver:
        bump = torch.exp(-((time - 0.4) / 0.01).square())
        return field.along(
            torch.stack((torch.ones_like(time), 100 * bump * torch.cos(150 * time), torch.sin(5 * time)), -1)[None]
        )

    return DriverSource(rates, torch.linspace(0, 1, steps + 1, dtype=torch.float64))


def final_state(source: DriverSource, discretization: Discretization) -> Tensor:
    query = torch.zeros(1, source.grid.shape[0] - 1, 1, KEY, dtype=torch.float64)
    return pf.integrate(
        source, query, discretization=discretization, initial_state=STATE, return_final_state=True
    ).final_state


def measure() -> dict:
    truth = {
        "scalar": final_state(smooth("scalar", 16384), Discretization("magnus4")),
        "vector": final_state(smooth("vector", 16384), Discretization("exact", splitting="strang")),
    }
    errors = {
        name: [
            float((final_state(smooth(decay, count), scheme) - truth[decay]).norm() / truth[decay].norm())
            for count in COUNTS
        ]
        for name, (decay, scheme) in SCHEMES.items()
    }
    fine = final_state(quick(16384), Discretization("magnus4"))
    adaptive = []
    for tolerance in TOLERANCES:
        options = {"relative_tolerance": tolerance, "absolute_tolerance": 0.0, "initial_state": STATE}
        refinement = paths.refine(quick(), **options)
        found = final_state(refinement.source, Discretization("magnus4"))
        steps = refinement.source.grid.shape[0] - 1
        even = final_state(quick(steps), Discretization("magnus4"))
        adaptive.append(
            {
                "tolerance": tolerance,
                "steps": steps,
                "rounds": refinement.rounds,
                "error": float((found - fine).norm() / fine.norm()),
                "error_of_as_many_even_steps": float((even - fine).norm() / fine.norm()),
            }
        )
    return {"steps": COUNTS, "errors": errors, "adaptive": adaptive}


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (name, errors), colour in zip(result["errors"].items(), plt.get_cmap("tab10").colors, strict=False):
        left.loglog(result["steps"], errors, marker="o", markersize=3, label=name, color=colour)
    left.set(xlabel="steps", ylabel="relative error of the final state", title="A driver that turns smoothly")
    left.legend(frameon=False, fontsize=7, loc="lower left")
    asked = [row["tolerance"] for row in result["adaptive"]]
    right.loglog(asked, [row["error"] for row in result["adaptive"]], marker="o", label="error of the refined grid")
    even = [row["error_of_as_many_even_steps"] for row in result["adaptive"]]
    right.loglog(asked, even, marker="o", label="error of as many even steps")
    right.loglog(asked, asked, color="0.6", linestyle=":", label="the tolerance")
    for row in result["adaptive"]:
        right.annotate(
            f"{row['steps']} steps",
            (row["tolerance"], row["error"]),
            fontsize=7,
            xytext=(4, -9),
            textcoords="offset points",
        )
    right.set(xlabel="tolerance asked for", ylabel="relative error", title="Steps where they are needed")
    right.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    result = measure()
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, RESULTS.with_suffix(".png"))
    print(json.dumps(result["adaptive"], indent=1))


if __name__ == "__main__":
    main()
