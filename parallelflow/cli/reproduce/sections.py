"""The sections of the report: what is claimed, and the figures as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from parallelflow.cli.reproduce import structure
from parallelflow.cli.reproduce.verdicts import growth, names, orders

Rows = list[dict[str, Any]]


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], align: str = "right") -> list[str]:
    """A Markdown table, the first column on the left, the others where ``align`` says."""
    return [
        "| " + " | ".join(headings) + " |",
        "| --- |" + (" ---: |" if align == "right" else " --- |") * (len(headings) - 1),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
    ]


def beside(rows: Rows, label: Sequence[str], across: str, cell: Callable[[Rows], object]) -> list[list[object]]:
    """Rows of a table: one for each combination of ``label``, with a cell for each value of ``across``."""
    lines: list[list[object]] = []
    for values in dict.fromkeys(tuple(row[key] for key in label) for row in rows):
        some = [row for row in rows if tuple(row[key] for key in label) == values]
        cells = [cell([row for row in some if row[across] == value]) for value in names(rows, across)]
        lines.append([_label(dict(zip(label, values, strict=True))), *cells])
    return lines


def _label(values: dict[str, Any]) -> str:
    return ", ".join(LABELS.get(key, "{}").format(value) for key, value in values.items())


LABELS = {"rows": "R = {}", "chunk": "C = {}", "length": "T = {:,}", "keys": "{} keys", "solver": "`{}`"}


def _quoted(rows: Rows, key: str) -> list[str]:
    return [f"`{name}`" for name in names(rows, key)]


def _structure(rows: Rows) -> list[str]:
    said = {
        "composition": "flows of equal pieces, composed, against the flow of all tokens",
        "low rank": "P - Λ: the first singular value beyond tokens · R, over the largest",
        "adjoint": "the gradient of ⟨S_t, D⟩ with respect to S_0, against Pᵀ D",
        "exponential, plus": "I + ((e^{tr ω} - 1) / tr ω) ω against e^ω, ω of rank 1",
        "exponential, minus": "the same with a minus before the fraction",
    }
    cells = []
    for name, what in said.items():
        some = [row for row in rows if row["property"] == name]
        sizes = ", ".join(f"{row['size']:g}" for row in some)
        cells.append([what, sizes, f"{max(row['error'] for row in some):.0e}"])
    return [
        "Claims: flows compose (Chen's relation); the transition of a few tokens is a decay and a low rank; the "
        "adjoint is the transposed flow; a step of rank 1 is one factor of a product of exponentials. float64, a decay "
        f"a key channel, K = {structure.KEY}, R = {structure.ROWS}; sizes are pieces of {structure.TOKENS} tokens, "
        "tokens, tokens, and |tr ω|.", "",
        *table(["", "sizes", "worst error"], cells),
    ]  # fmt: skip


def _signatures(rows: Rows) -> list[str]:
    return [
        "Claim: sigDelta is akin to the signature kernel's equation, `k(s, t) = 1 + ∫∫ k d⟨x, y⟩`. Of two straight "
        "lines it is a Bessel function. Relative errors on a grid of so many cells a side: by the stencil along "
        "anti-diagonals, by each solver on the triangular system of all cells, and by the engine, whose state is a "
        "column of the grid. All are the same number up to rounding, and of order 1 in the size of a cell.", "",
        *table(["cells a side", *_quoted(rows, "route")],
               beside(rows, ["steps"], "route", lambda some: f"{some[0]['error']:.2e}")),
    ]  # fmt: skip


def _equivalence(rows: Rows) -> list[str]:
    dtypes = names(rows, "dtype")
    exact = {dtype: [row for row in rows if row["dtype"] == dtype] for dtype in dtypes}
    gradients = {row["solver"]: 0.0 for row in rows}
    for row in exact["float64"]:
        gradients[row["solver"]] = max(gradients[row["solver"]], row["gradient_error"])
    cells = beside(rows, ["solver"], "dtype", lambda some: f"{max(row['error'] for row in some):.1e}")
    cells = [[*line, f"{error:.1e}"] for line, error in zip(cells, gradients.values(), strict=True)]
    best = [f"*{max(row['unavoidable'] for row in exact[dtype]):.1e}*" for dtype in dtypes]
    return [
        "Claim: tensorInv, sigDelta and the scans compute the recurrence. The worst error over R, C and the three "
        "aggregates; unavoidable is what rounding the inputs and the output does to the recurrence itself.", "",
        *table(["solver", *dtypes, "gradients, float64"], [*cells, ["*unavoidable*", *best, ""]]),
    ]  # fmt: skip


def _complexity(rows: Rows) -> list[str]:
    counts = beside(
        rows, ["rows", "chunk"], "solver",
        lambda some: f"{some[0]['operations'] / 1e6:,.2f} / {some[0]['stages']} / {some[0]['serial']:,}",
    )  # fmt: skip
    quantities = ("operations", "stages", "serial", "memory")
    grown = [
        [f"{quantity}, over {over}", *(f"{growth(rows, x, quantity, key):.2f}" for x in names(rows, "solver"))]
        for quantity in quantities
        for over, key in (("C", "chunk"), ("R", "rows"))
    ]
    return [
        "Claim: with all cells of an anti-diagonal at once, sigDelta needs O(C) stages, where substitution needs O(C²) "
        "and an inverse O((CR)³) operations; both hold O((CR)²) numbers. Counted from the operations that run, on one "
        "chunk, K + V = 256: operations in millions / longest chain of tensor operations / the same with every sum "
        "taken term by term.", "",
        "`sequential` is left-looking substitution, `substitution` right-looking, `tensor_inverse` the blocked "
        "inverse.", "",
        *table(["", *_quoted(rows, "solver")], counts), "",
        "How they grow: the exponent between the two largest C at the largest R, and between the two largest R at the "
        "largest C. Memory is the peak of the numbers held beside G and Z.", "",
        *table(["", *_quoted(rows, "solver")], grown), "",
        "Stages are those of tensor operations: where a product and its sums are one, sigDelta has 2C - 3 and "
        "right-looking substitution C - 1. The blocked inverse does more arithmetic than either in fewer stages as "
        "chunks grow, most of them matrix products.",
    ]  # fmt: skip


def _accuracy(rows: Rows) -> list[str]:
    return [
        "Relative errors of solutions, the worst over R, everything in the given dtype, against float64 on the same "
        "rounded system. Neumann doubling, `(I + G)(I + G²)(I + G⁴)…`, is here as the caution: for correlated keys the "
        "powers of G grow as binomials. The library never forms them.", "",
        *table(["", *_quoted(rows, "inverse")], beside(rows, ["keys", "dtype", "chunk"], "inverse", _worst)),
    ]  # fmt: skip


def _worst(rows: Rows) -> str:
    errors = [row["error"] for row in rows]
    return "overflow" if None in errors else f"{max(errors):.1e}"


def _convergence(rows: Rows) -> list[str]:
    most = max(row["steps"] for row in rows)
    last = {row["scheme"]: row["error"] for row in rows if row["steps"] == most}
    cells = [
        [f"`{scheme}`", expected, f"{measured:.2f}", f"{last[scheme]:.1e}"]
        for scheme, (expected, measured) in orders(rows).items()
    ]
    return [
        "Claim: a discretisation of the flow is a choice of its own. On a driver that varies in time, under a scalar "
        "decay, the error falls with the order of the scheme.", "",
        *table(["scheme", "order", "measured", f"error at {most} steps"], cells),
    ]  # fmt: skip


def _milliseconds(rows: Rows) -> str:
    return f"{rows[0]['milliseconds']:.1f}"


def _runtime(rows: Rows) -> list[str]:
    return [
        f"Milliseconds of the forward pass of `low_rank_flow`, {rows[0]['length']} tokens, 4 heads of 64, float32, the "
        "best of 3, in plain tensor algebra: every stage is an operation of its own, so a solver of few stages is "
        "ahead of one of little arithmetic.", "",
        *table(["", *_quoted(rows, "solver")], beside(rows, ["device", "rows", "chunk"], "solver", _milliseconds)),
    ]  # fmt: skip


def _aggregation(rows: Rows) -> list[str]:
    cells = beside(rows, ["device", "length"], "aggregate", _milliseconds)
    apart = [max(r["difference"] for r in rows if (r["device"], r["length"]) == key)
             for key in dict.fromkeys((r["device"], r["length"]) for r in rows)]  # fmt: skip
    return [
        "Claim: across chunks flows compose associatively, so time can be cut anywhere. Milliseconds of the forward "
        "pass of `gated_delta_rule`, one head of 64, float32, and the largest difference from `sequential`.", "",
        *table(
            ["", *_quoted(rows, "aggregate"), "difference"],
            [[*line, f"{difference:.0e}"] for line, difference in zip(cells, apart, strict=True)],
        ),
    ]  # fmt: skip


SECTIONS: dict[str, tuple[str, Callable[[Rows], list[str]]]] = {
    "structure": ("The structure of a flow", _structure),
    "equivalence": ("Equivalence", _equivalence),
    "complexity": ("Complexity inside a chunk", _complexity),
    "accuracy": ("Accuracy inside a chunk", _accuracy),
    "signatures": ("Signature kernels", _signatures),
    "convergence": ("Orders of convergence", _convergence),
    "runtime": ("Runtime over chunk size and rank", _runtime),
    "aggregation": ("Aggregation across chunks", _aggregation),
}
"""Of each part, the title and what stands under it."""
