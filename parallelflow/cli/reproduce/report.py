"""The report: what the paper says, what was measured, and whether it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallelflow.cli.reproduce.sections import SECTIONS, Rows, table
from parallelflow.cli.reproduce.verdicts import AGREEMENT, ORDER, VERDICTS, orders


def failures(held: dict[str, Any]) -> list[str]:
    """What had to hold and did not. Claims that the paper is honest to lose with fail nothing."""
    missed = []
    for row in _rows(held, "equivalence"):
        allowed = AGREEMENT if row["dtype"] == "float64" else max(2 * row["unavoidable"], 1e-6)
        errors = {"output": row["error"], "gradient": row["gradient_error"]}
        missed += [
            f"equivalence: {row['solver']}, {row['aggregate']}, {row['dtype']}, C = {row['chunk_size']}, "
            f"R = {row['rows']}: {name} {error:.1e}"
            for name, error in errors.items()
            if error is not None and not error <= allowed
        ]
    missed += [
        f"structure: {row['property']} at {row['size']:g}: {row['error']:.1e}"
        for row in _rows(held, "structure")
        if row["property"] != "exponential, minus" and not row["error"] <= AGREEMENT
    ]
    return missed + [
        f"convergence: {scheme} is of order {measured:.2f}, expected {expected}"
        for scheme, (expected, measured) in orders(_rows(held, "convergence")).items()
        if not abs(measured - expected) <= ORDER
    ]


def write_report(held: dict[str, Any], file: Path) -> Path:
    """``report.md``, from the parts that there are."""
    lines = [
        "# The paper, measured", "",
        "N. Muca Cirone and C. Salvi, *ParallelFlow: Parallelizing Linear Transformers via Flow Discretization*, "
        "[arXiv 2504.00492](https://arxiv.org/abs/2504.00492). Written by `parallelflow reproduce`; every figure is in "
        "the JSON file beside each plot.", "",
        "## Verdicts", "",
        *table(
            ["statement", "verdict", "measured"],
            [verdict for part, figures in held.items() for verdict in VERDICTS[part](figures["rows"])], align="left",
        ), "",
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


def _rows(held: dict[str, Any], part: str) -> Rows:
    return held[part]["rows"] if part in held else []
