"""What is measured, part by part: each yields its figures one after another, as plain dictionaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from parallelflow import functional
from parallelflow.cli.demo import recurrences
from parallelflow.cli.demo.agreement import forward_time, relative_error
from parallelflow.cli.demo.inputs import Sizes, draw_inputs
from parallelflow.cli.reproduce import turning
from parallelflow.cli.reproduce.counting import count
from parallelflow.cli.reproduce.inverses import neumann_doubling
from parallelflow.cli.reproduce.systems import chunk_system
from parallelflow.solvers import SOLVERS, Solver

Figures = dict[str, Any]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
AGGREGATES = ("sequential", "associative", "segmented")


@torch.no_grad()
def equivalence(quick: bool) -> Iterator[Figures]:
    """Every solver and every aggregate against the recurrence, over R, C and dtype. ``unavoidable``: the error of
    the float64 recurrence on the rounded inputs, its output rounded; in float32, of the float32 recurrence."""
    for rows in (1, 2) if quick else (1, 2, 4):
        drawn = draw_inputs("low_rank_flow", Sizes(1, 96 if quick else 200, 2, 16, 16, rows), torch.float64)
        reference = recurrences.low_rank_flow(**drawn)[0]
        for name, dtype in DTYPES.items():
            inputs: dict[str, Any] = {key: x.to(dtype) for key, x in drawn.items()}
            if name == "bfloat16":
                inputs["log_decay"] = drawn["log_decay"].float()  # models compute decays in float32
            working = torch.float32 if name == "float32" else torch.float64
            alone = recurrences.low_rank_flow(**{key: x.to(working) for key, x in inputs.items()})[0].to(dtype)
            for chunk in (4, 16) if quick else (4, 16, 64):
                for solver, aggregate in product(SOLVERS, AGGREGATES):
                    choices: dict[str, Any] = {"solver": solver, "aggregate": aggregate, "chunk_size": chunk}
                    found = functional.low_rank_flow(**inputs, **choices, backend="torch").output
                    yield {
                        "rows": rows, **choices, "dtype": name,
                        "error": relative_error(found.double(), reference),
                        "unavoidable": relative_error(alone.double(), reference),
                    }  # fmt: skip


def complexity(quick: bool) -> Iterator[Figures]:
    """Operations and dependent stages of each solver on one chunk, counted while it runs: D = K + V = 256 columns.

    What a solver prepares is counted with it: the inverse, or sigDelta's differences of G.
    """
    for rows in (1, 2, 4, 8):
        for chunk in (16, 32, 64) if quick else (16, 32, 64, 128, 256):
            gram, right = (x.float() for x in chunk_system(chunk, rows, 256))
            for name, solver in SOLVERS.items():
                counted = count(partial(_solve, solver, gram, rows, right))
                yield {"rows": rows, "chunk": chunk, "solver": name, **asdict(counted)}


def _solve(solver: Solver, gram: Tensor, rows: int, right: Tensor) -> Tensor:
    return solver(gram, rows).solve(right)


INVERSES: dict[str, Solver] = {**SOLVERS, "neumann_doubling": neumann_doubling}


@torch.no_grad()
def accuracy(quick: bool) -> Iterator[Figures]:
    """Errors of every solver, and of Neumann doubling, against float64 on the same rounded system."""
    for correlated, name in product((False, True), ("float32", "bfloat16")):
        for rows, chunk in product((1, 4) if quick else (1, 2, 4, 8), (16, 64) if quick else (16, 32, 64, 128, 256)):
            gram, right = (x.to(DTYPES[name]) for x in chunk_system(chunk, rows, 32, correlated=correlated))
            wide = torch.eye(gram.shape[-1], dtype=torch.float64) - gram.double()
            exact = torch.linalg.solve_triangular(wide, right.double(), upper=False, unitriangular=True)
            for inverse, solver in INVERSES.items():
                found = solver(gram, rows).solve(right).double()
                error = relative_error(found, exact)
                yield {
                    "keys": "correlated" if correlated else "random", "dtype": name, "rows": rows, "chunk": chunk,
                    "inverse": inverse, "error": error if math.isfinite(error) else None,
                }  # fmt: skip


@torch.no_grad()
def convergence(quick: bool) -> Iterator[Figures]:
    """Errors of the discretisations on a driver that turns smoothly, and the order that they fall with."""
    counts = (16, 32, 64) if quick else (16, 32, 64, 128, 256)
    truth = turning.final_state(4096, "magnus4")
    for scheme, expected in turning.ORDERS.items():
        errors = [relative_error(turning.final_state(steps, scheme), truth) for steps in counts]
        order = math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])
        yield {"scheme": scheme, "steps": list(counts), "errors": errors, "order": order, "expected": expected}


@torch.no_grad()
def runtime(quick: bool) -> Iterator[Figures]:
    """Milliseconds of the forward pass over chunk size and rank, by solver, on the CPU and on a GPU if there is one."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for rows in (1, 4) if quick else (1, 2, 4):
            sizes = Sizes(1, 512 if quick else 2048, 4, 64, 64, rows)
            inputs = draw_inputs("low_rank_flow", sizes, torch.float32)
            inputs = {name: x.to(device) for name, x in inputs.items() if name != "log_decay"}
            for chunk, solver in product((16, 64) if quick else (16, 32, 64, 128), SOLVERS):
                run = partial(_finished, device, solver=solver, chunk_size=chunk, backend="torch")
                yield {
                    "device": device, "rows": rows, "chunk": chunk, "solver": solver, "length": sizes.length,
                    "milliseconds": forward_time(run, inputs, repeats=3),
                }  # fmt: skip


def _finished(device: str, **arguments: Any) -> tuple:
    result = functional.low_rank_flow(**arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return result


@torch.no_grad()
def aggregation(quick: bool) -> Iterator[Figures]:
    """Milliseconds of the forward pass over T by aggregate, one head, and the largest difference from `sequential`."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for length in (512, 2048) if quick else (512, 2048, 8192, 32768):
            inputs = draw_inputs("gated_delta_rule", Sizes(1, length, 1, 64, 64), torch.float32)
            inputs = {name: x.to(device) for name, x in inputs.items()}
            reference: Tensor | None = None
            for aggregate in AGGREGATES:
                run = partial(_gated, device, aggregate=aggregate, backend="torch")
                output = run(**inputs)[0]
                reference = output if reference is None else reference
                yield {
                    "device": device, "length": length, "aggregate": aggregate,
                    "milliseconds": forward_time(run, inputs, repeats=3),
                    "difference": relative_error(output, reference),
                }  # fmt: skip


def _gated(device: str, **arguments: Any) -> tuple:
    result = functional.gated_delta_rule(**arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return result


PARTS: dict[str, Callable[[bool], Iterator[Figures]]] = {
    "equivalence": equivalence,
    "complexity": complexity,
    "accuracy": accuracy,
    "convergence": convergence,
    "runtime": runtime,
    "aggregation": aggregation,
}
"""Each takes whether it is to be quick."""
