"""One plot a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]
Curves = dict[str, tuple[list[float], list[float]]]


def plot(part: str, rows: Rows, file: Path) -> Path:
    """The part's figures, every panel on logarithmic axes."""
    panels, across, up = PLOTS[part](rows)
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for place, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for name, (x, y) in curves.items():
            place.loglog(x, y, marker="o", markersize=3, label=name)
        place.set(title=title, xlabel=across, ylabel=up)
        place.spines[["top", "right"]].set_visible(False)
        if curves:
            place.legend(frameon=False, fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def curves(figures: Rows, name: str, x: str, y: str, **where: Any) -> Curves:
    """One curve for each value of ``name``: ``y`` over ``x`` in the figures where all of ``where`` holds."""
    found: Curves = {}
    for row in figures:
        if row[y] and all(row[key] == value for key, value in where.items()):
            xs, ys = found.setdefault(str(row[name]), ([], []))
            xs.append(row[x])
            ys.append(row[y])
    return found


def _equivalence(rows: Rows) -> tuple[dict[str, Curves], str, str]:
    rank = max(row["rows"] for row in rows)
    panels = {
        f"{dtype}, R = {rank}": curves(
            rows, "solver", "chunk_size", "error", dtype=dtype, rows=rank, aggregate="sequential"
        )
        for dtype in ("float64", "float32", "bfloat16")
    }
    return panels, "tokens a chunk", "error against the recurrence"


def _complexity(rows: Rows) -> tuple[dict[str, Curves], str, str]:
    panels = {f"{y}, R = 4": curves(rows, "solver", "chunk", y, rows=4) for y in ("operations", "stages", "serial")}
    return panels, "tokens a chunk", "counted"


def _accuracy(rows: Rows) -> tuple[dict[str, Curves], str, str]:
    panels = {
        f"{keys} keys, {dtype}, R = 1": curves(rows, "inverse", "chunk", "error", keys=keys, dtype=dtype, rows=1)
        for dtype in ("float32", "bfloat16")
        for keys in ("random", "correlated")
    }
    return panels, "tokens a chunk", "relative error"


def _convergence(rows: Rows) -> tuple[dict[str, Curves], str, str]:
    return {"a driver that turns": {r["scheme"]: (r["steps"], r["errors"]) for r in rows}}, "steps", "relative error"


def _runtime(rows: Rows) -> tuple[dict[str, Curves], str, str]:
    panels = {
        f"{device}, R = {rank}": curves(rows, "solver", "chunk", "milliseconds", device=device, rows=rank)
        for device, rank in sorted({(row["device"], row["rows"]) for row in rows})
    }
    return panels, "tokens a chunk", "milliseconds, forward"


def _aggregation(rows: Rows) -> tuple[dict[str, Curves], str, str]:
    panels = {
        device: curves(rows, "aggregate", "length", "milliseconds", device=device)
        for device in sorted({row["device"] for row in rows})
    }
    return panels, "tokens", "milliseconds, forward"


PLOTS: dict[str, Callable[[Rows], tuple[dict[str, Curves], str, str]]] = {
    "equivalence": _equivalence,
    "complexity": _complexity,
    "accuracy": _accuracy,
    "convergence": _convergence,
    "runtime": _runtime,
    "aggregation": _aggregation,
}
