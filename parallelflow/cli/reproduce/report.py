"""The report: what the paper says, what was measured, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
AGREEMENT = 1e-10
"""The largest error at which float64 results count as the recurrence's."""
ORDER = 0.15
"""How far a measured order may be from the scheme's."""


def failures(held: dict[str, Any]) -> list[str]:
    """What had to hold and did not. Solvers that the paper is honest to lose with fail nothing."""
    missed = []
    for row in held.get("equivalence", {"rows": []})["rows"]:
        allowed = AGREEMENT if row["dtype"] == "float64" else max(2 * row["unavoidable"], 1e-6)
        if not row["error"] <= allowed:
            which = ", ".join(str(row[x]) for x in ("solver", "aggregate", "dtype"))
            missed.append(f"equivalence: {which}, C = {row['chunk_size']}, R = {row['rows']}: {row['error']:.1e}")
    return missed + [
        f"convergence: {row['scheme']} is of order {row['order']:.2f}, expected {row['expected']}"
        for row in held.get("convergence", {"rows": []})["rows"]
        if abs(row["order"] - row["expected"]) > ORDER
    ]


def write_report(held: dict[str, Any], file: Path) -> Path:
    """``report.md``, from the parts that there are."""
    lines = [
        "# The paper, measured", "",
        "N. Muca Cirone and C. Salvi, *ParallelFlow: Parallelizing Linear Transformers via Flow Discretization*, "
        "[arXiv 2504.00492](https://arxiv.org/abs/2504.00492). Written by `parallelflow reproduce`; every figure is in "
        "the JSON file beside each plot.", "",
    ]  # fmt: skip
    for part, figures in held.items():
        title, write = SECTIONS[part]
        on = figures["machine"]
        size = "quick sizes" if figures["quick"] else "full sizes"
        where = f"{on['gpu']}, " if on["gpu"] else ""
        lines += [f"## {title}", "", *write(figures["rows"]), "", f"![{title}]({part}.png)", ""]
        lines += [f"{size}; {figures['seconds']:.0f} s on {where}{on['system']}, {on['threads']} threads, "
                  f"PyTorch {on['torch']}.", ""]  # fmt: skip
    missed = failures(held)
    lines += ["## What had to hold and did not", "", *([f"- {line}" for line in missed] or ["Nothing."])]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table, the first column on the left."""
    return [
        "| " + " | ".join(headings) + " |",
        "| --- |" + " ---: |" * (len(headings) - 1),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
    ]


def _names(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _equivalence(rows: Rows) -> list[str]:
    cells = []
    for solver in _names(rows, "solver"):
        line: list[object] = [f"`{solver}`"]
        for dtype in _names(rows, "dtype"):
            some = [row for row in rows if (row["solver"], row["dtype"]) == (solver, dtype)]
            line.append(f"{max(row['error'] for row in some):.1e}")
        cells.append(line)
    best = ["*unavoidable*"] + [
        f"*{max(row['unavoidable'] for row in rows if row['dtype'] == dtype):.1e}*" for dtype in _names(rows, "dtype")
    ]
    return [
        "Claim: tensorInv, sigDelta and the scans compute the recurrence. The worst error over R, C and the three "
        "aggregates; unavoidable is what rounding the inputs and the output does to the recurrence itself.", "",
        *table(["solver", *_names(rows, "dtype")], [*cells, best]),
    ]  # fmt: skip


def _complexity(rows: Rows) -> list[str]:
    solvers = _names(rows, "solver")
    lines = [
        "Claim: with all cells of an anti-diagonal at once, sigDelta needs O(C) stages, where substitution needs O(C²) "
        "and an inverse O((CR)³) operations. Counted from the operations that run, on one chunk, K + V = 256: "
        "operations in millions / longest chain of tensor operations / the same with every sum taken term by term.", "",
        "`sequential` is left-looking substitution, `substitution` right-looking, `tensor_inverse` the blocked "
        "inverse.", "",
    ]  # fmt: skip
    cells = []
    for rank in _names(rows, "rows"):
        for chunk in _names(rows, "chunk"):
            found = {row["solver"]: row for row in rows if (row["rows"], row["chunk"]) == (rank, chunk)}
            counted = [(found[x]["operations"] / 1e6, found[x]["stages"], found[x]["serial"]) for x in solvers]
            cells.append([f"R = {rank}, C = {chunk}", *(f"{a:,.2f} / {b} / {c:,}" for a, b, c in counted)])
    lines += table(["", *(f"`{x}`" for x in solvers)], cells)
    return [*lines, "", *_verdict(rows)]


def _verdict(rows: Rows) -> list[str]:
    """In the figures' own numbers."""
    at = {(row["solver"], row["rows"], row["chunk"]): row for row in rows}
    pairs = [(at["sigdelta", *key[1:]], at["substitution", *key[1:]]) for key in at if key[0] == "substitution"]
    more = [sig["operations"] / right["operations"] for sig, right in pairs]
    longer = [sig["stages"] / right["stages"] for sig, right in pairs]
    serial = [at["sequential", *k[1:]]["serial"] / at["sigdelta", *k[1:]]["serial"] for k in at if k[0] == "sigdelta"]
    return [
        f"Verdict: against left-looking substitution with serial sums the claim holds: sigDelta's chain is "
        f"{min(serial):.2g} to {max(serial):.2g} times shorter. Right-looking substitution, which sends each row to "
        f"all later rows as soon as it is known, needs no anti-diagonals and is ahead in both columns: sigDelta takes "
        f"{min(more):.2f} to {max(more):.2f} times its operations and {min(longer):.2f} to {max(longer):.2f} times its "
        f"stages (with a product and its sums fused, 2C - 3 against C - 1). The blocked inverse does more arithmetic "
        f"than either in fewer stages as chunks grow, most of them matrix products."
    ]


def _accuracy(rows: Rows) -> list[str]:
    inverses = _names(rows, "inverse")
    cells = []
    for keys, dtype in dict.fromkeys((row["keys"], row["dtype"]) for row in rows):
        for chunk in _names(rows, "chunk"):
            some = [row for row in rows if (row["keys"], row["dtype"], row["chunk"]) == (keys, dtype, chunk)]
            worst = [_worst([row["error"] for row in some if row["inverse"] == name]) for name in inverses]
            cells.append([f"{keys} keys, {dtype}, C = {chunk}", *worst])
    return [
        "Relative errors of solutions, the worst over R, everything in the given dtype, against float64 on the same "
        "rounded system. Neumann doubling, `(I + G)(I + G²)(I + G⁴)…`, is here as the caution: for correlated keys the "
        "powers of G grow as binomials. The library never forms them.", "",
        *table(["", *(f"`{name}`" for name in inverses)], cells),
    ]  # fmt: skip


def _worst(errors: list[float | None]) -> str:
    finite = [x for x in errors if x is not None]
    return f"{max(finite):.1e}" if len(finite) == len(errors) else "overflow"


def _convergence(rows: Rows) -> list[str]:
    cells = [[f"`{r['scheme']}`", r["expected"], f"{r['order']:.2f}", f"{r['errors'][-1]:.1e}"] for r in rows]
    return [
        "Claim: a discretisation of the flow is a choice of its own. On a driver that varies in time, under a scalar "
        "decay, the error falls with the order of the scheme.", "",
        *table(["scheme", "order", "measured", f"error at {rows[0]['steps'][-1]} steps"], cells),
    ]  # fmt: skip


def _runtime(rows: Rows) -> list[str]:
    solvers = _names(rows, "solver")
    cells = []
    for device, rank, chunk in dict.fromkeys((row["device"], row["rows"], row["chunk"]) for row in rows):
        here = {r["solver"]: r for r in rows if (r["device"], r["rows"], r["chunk"]) == (device, rank, chunk)}
        cells.append([f"{device}, R = {rank}, C = {chunk}", *(f"{here[x]['milliseconds']:.1f}" for x in solvers)])
    return [
        f"Milliseconds of the forward pass of `low_rank_flow`, {rows[0]['length']} tokens, 4 heads of 64, float32, the "
        "best of 3, in plain tensor algebra: every stage is an operation of its own, so a solver of few stages is "
        "ahead of one of little arithmetic.", "",
        *table(["", *(f"`{x}`" for x in solvers)], cells),
    ]  # fmt: skip


def _aggregation(rows: Rows) -> list[str]:
    aggregates = _names(rows, "aggregate")
    cells = []
    for device, length in dict.fromkeys((row["device"], row["length"]) for row in rows):
        here = {r["aggregate"]: r for r in rows if (r["device"], r["length"]) == (device, length)}
        times = (f"{here[x]['milliseconds']:.1f}" for x in aggregates)
        cells.append([f"{device}, T = {length:,}", *times, f"{max(r['difference'] for r in here.values()):.0e}"])
    return [
        "Claim: across chunks flows compose associatively, so time can be cut anywhere. Milliseconds of the forward "
        "pass of `gated_delta_rule`, one head of 64, float32, and the largest difference from `sequential`.", "",
        *table(["", *(f"`{x}`" for x in aggregates), "difference"], cells),
    ]  # fmt: skip


SECTIONS = {
    "equivalence": ("Equivalence", _equivalence),
    "complexity": ("Complexity inside a chunk", _complexity),
    "accuracy": ("Accuracy inside a chunk", _accuracy),
    "convergence": ("Orders of convergence", _convergence),
    "runtime": ("Runtime over chunk size and rank", _runtime),
    "aggregation": ("Aggregation across chunks", _aggregation),
}
