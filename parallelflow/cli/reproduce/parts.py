"""What is measured, part by part: a part names its settings, and measures one of them at a time.

Settings and figures are plain dictionaries that JSON can hold; a figure has its setting in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallelflow import functional
from parallelflow.cli.demo import recurrences
from parallelflow.cli.demo.agreement import milliseconds, relative_error
from parallelflow.cli.demo.inputs import Sizes, draw_inputs
from parallelflow.cli.reproduce import signatures, structure, turning
from parallelflow.cli.reproduce.counting import count
from parallelflow.cli.reproduce.inverses import neumann_doubling
from parallelflow.cli.reproduce.memory import peak
from parallelflow.cli.reproduce.systems import chunk_system
from parallelflow.solvers import SOLVERS, Solver

Figures = dict[str, Any]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
AGGREGATES = ("sequential", "associative", "segmented")
LONG = 300.0  # milliseconds
INVERSES: dict[str, Solver] = {**SOLVERS, "neumann_doubling": neumann_doubling}


class Part(NamedTuple):
    """``settings(quick)`` in the order of measuring; ``measure(**setting)`` finds what ``finds`` names."""

    settings: Callable[[bool], list[Figures]]
    measure: Callable[..., Figures]
    finds: tuple[str, ...]


def crossed(**choices: tuple[Any, ...] | Any) -> list[Figures]:
    """Every combination of the choices, the first slowest."""
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def _equivalence_settings(quick: bool) -> list[Figures]:
    return crossed(
        rows=(1, 2) if quick else (1, 2, 4),
        length=(96 if quick else 200,),
        dtype=tuple(DTYPES),
        chunk_size=(4, 16) if quick else (4, 16, 64),
        solver=tuple(SOLVERS),
        aggregate=AGGREGATES,
    )


def _equivalence(*, rows: int, length: int, dtype: str, **choices: Any) -> Figures:
    """A solver and an aggregate against the recurrence. ``unavoidable``: the error of the float64 recurrence on the
    rounded inputs, its output rounded; in float32, of the float32 recurrence. ``gradient_error``: the worst over the
    inputs, in float64 (else None)."""
    inputs, expected, unavoidable = _recurrence(rows, length, dtype)
    run = _bound("low_rank_flow", choices)
    gradient_error = None
    if dtype == "float64":
        gradients = _gradients(run, inputs)
        wanted = _recurrence_gradients(rows, length)
        gradient_error = max(relative_error(gradients[name], wanted[name]) for name in wanted)
    error = relative_error(run(**inputs).output.double(), expected)
    return {"error": error, "unavoidable": unavoidable, "gradient_error": gradient_error}


@cache
def _recurrence(rows: int, length: int, dtype: str) -> tuple[dict[str, Tensor], Tensor, float]:
    """Inputs rounded to ``dtype``, the float64 recurrence of those that were not, and the unavoidable error."""
    drawn = draw_inputs("low_rank_flow", Sizes(1, length, 2, 16, 16, rows), torch.float64)
    expected = recurrences.low_rank_flow(**drawn)[0]
    inputs = {name: x.to(DTYPES[dtype]) for name, x in drawn.items()}
    if dtype == "bfloat16":
        inputs["log_decay"] = drawn["log_decay"].float()  # models compute decays in float32
    working = torch.float32 if dtype == "float32" else torch.float64
    alone = recurrences.low_rank_flow(**{name: x.to(working) for name, x in inputs.items()})[0].to(DTYPES[dtype])
    return inputs, expected, relative_error(alone.double(), expected)


@cache
def _recurrence_gradients(rows: int, length: int) -> dict[str, Tensor]:
    return _gradients(recurrences.low_rank_flow, _recurrence(rows, length, "float64")[0])


def _gradients(run: Callable[..., tuple], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all inputs, under a fixed random cotangent of the output."""
    with torch.enable_grad():
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        output = run(**leaves)[0]
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
        return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), weight), strict=True))


def _complexity_settings(quick: bool) -> list[Figures]:
    chunks = (16, 32, 64) if quick else (16, 32, 64, 128, 256)
    return crossed(rows=(1, 2, 4, 8), chunk=chunks, solver=tuple(SOLVERS))


def _complexity(*, rows: int, chunk: int, solver: str) -> Figures:
    """Operations, dependent stages and memory of a solver on one chunk, counted while it runs: D = K + V = 256 columns.

    What a solver prepares is counted with it: the inverse, or sigDelta's differences of G.
    """
    gram, right = (x.float() for x in chunk_system(chunk, rows, 256))
    run = partial(_solve, SOLVERS[solver], gram, rows, right)
    return asdict(count(run)) | {"memory": peak(run)}


def _solve(solver: Solver, gram: Tensor, rows: int, right: Tensor) -> Tensor:
    return solver(gram, rows).solve(right)


def _accuracy_settings(quick: bool) -> list[Figures]:
    return crossed(
        keys=("random", "correlated"),
        dtype=("float32", "bfloat16"),
        rows=(1, 4) if quick else (1, 2, 4, 8),
        chunk=(16, 64) if quick else (16, 32, 64, 128, 256),
        inverse=tuple(INVERSES),
    )


def _accuracy(*, keys: str, dtype: str, rows: int, chunk: int, inverse: str) -> Figures:
    """The error of a solver, or of Neumann doubling, against float64 on the same rounded system; None: it overflowed"""
    gram, right = (x.to(DTYPES[dtype]) for x in chunk_system(chunk, rows, 32, correlated=keys == "correlated"))
    wide = torch.eye(gram.shape[-1], dtype=torch.float64) - gram.double()
    exact = torch.linalg.solve_triangular(wide, right.double(), upper=False, unitriangular=True)
    error = relative_error(_solve(INVERSES[inverse], gram, rows, right).double(), exact)
    return {"error": error if math.isfinite(error) else None}


def _structure_settings(quick: bool) -> list[Figures]:
    sizes = {"composition": (2, 4, 8, 16), "low rank": (1, 2, 4, 8, 16), "adjoint": (1, 2, 4, 8, 16)}
    traces = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    every = (crossed(property=(name,), size=sizes.get(name, traces)) for name in structure.PROPERTIES)
    return list(chain.from_iterable(every))


def _structure(*, property: str, size: float) -> Figures:
    """How far each statement of the theory is from true, in float64."""
    return structure.PROPERTIES[property](size)


def _signatures_settings(quick: bool) -> list[Figures]:
    return crossed(route=signatures.ROUTES, steps=(2, 4, 8, 16) if quick else (2, 4, 8, 16, 32))


def _signatures(*, route: str, steps: int) -> Figures:
    """The kernel of two straight lines on a grid, and how far it is from that of the lines themselves."""
    found = signatures.kernel(route, steps)
    return {"kernel": found, "error": abs(found - signatures.EXACT) / signatures.EXACT}


def _convergence_settings(quick: bool) -> list[Figures]:
    return crossed(scheme=tuple(turning.ORDERS), steps=(16, 32, 64) if quick else (16, 32, 64, 128, 256))


def _convergence(*, scheme: str, steps: int) -> Figures:
    """The error of a discretisation on a driver that turns smoothly, against Magnus-4 in 4,096 steps."""
    return {"error": relative_error(turning.final_state(steps, scheme), _turned())}


@cache
def _turned() -> Tensor:
    return turning.final_state(4096, "magnus4")


def _runtime_settings(quick: bool) -> list[Figures]:
    return crossed(
        device=_devices(),
        rows=(1, 4) if quick else (1, 2, 4),
        length=(512 if quick else 2048,),
        chunk=(16, 64) if quick else (16, 32, 64, 128),
        solver=tuple(SOLVERS),
    )


def _runtime(*, device: str, rows: int, length: int, chunk: int, solver: str) -> Figures:
    """Milliseconds of the forward pass, in plain tensor algebra."""
    inputs = {name: x.to(device) for name, x in _timed("low_rank_flow", length, 4, rows).items() if name != "log_decay"}
    run = _bound("low_rank_flow", inputs)
    return {"milliseconds": _time(partial(run, solver=solver, chunk_size=chunk), device)}


def _aggregation_settings(quick: bool) -> list[Figures]:
    lengths = (512, 2048) if quick else (512, 2048, 8192, 32768)
    return crossed(device=_devices(), length=lengths, aggregate=AGGREGATES)


def _aggregation(*, device: str, length: int, aggregate: str) -> Figures:
    """Milliseconds of the forward pass, one head, and the difference from carrying the state from chunk to chunk."""
    inputs = {name: x.to(device) for name, x in _timed("gated_delta_rule", length, 1).items()}
    run = _bound("gated_delta_rule", inputs)
    difference = relative_error(run(aggregate=aggregate)[0], run(aggregate="sequential")[0])
    return {"milliseconds": _time(partial(run, aggregate=aggregate), device), "difference": difference}


def _bound(model: str, arguments: Figures) -> Callable[..., Any]:
    """A model in plain tensor algebra."""
    return partial(getattr(functional, model), **arguments, backend="torch")


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@cache
def _timed(model: str, length: int, heads: int, rows: int = 1) -> dict[str, Tensor]:
    return draw_inputs(model, Sizes(1, length, heads, 64, 64, rows), torch.float32)


def _time(run: Callable[[], object], device: str) -> float:
    """The best of three runs, of two where one takes long. The first warms up what is slow at first."""

    def finished() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    first = milliseconds(finished, repeats=1)
    return min(first, milliseconds(finished, repeats=1 if first > LONG else 2))


PARTS = {
    "structure": Part(_structure_settings, _structure, ("error", "rank")),
    "equivalence": Part(_equivalence_settings, _equivalence, ("error", "unavoidable", "gradient_error")),
    "complexity": Part(_complexity_settings, _complexity, ("operations", "stages", "serial", "memory")),
    "accuracy": Part(_accuracy_settings, _accuracy, ("error",)),
    "signatures": Part(_signatures_settings, _signatures, ("kernel", "error")),
    "convergence": Part(_convergence_settings, _convergence, ("error",)),
    "runtime": Part(_runtime_settings, _runtime, ("milliseconds",)),
    "aggregation": Part(_aggregation_settings, _aggregation, ("milliseconds", "difference")),
}
