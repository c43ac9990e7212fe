"""One plot a part."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

Rows = list[dict[str, Any]]
Curves = dict[str, tuple[list[float], list[float]]]
Panels = dict[str, Curves]
Drawing = tuple[Panels, tuple[str, ...], str]
"""Panels, what they are over (each label for an equal share of them), and what they show."""
LOOKS = ("o-", "s--", "^-.", "v:", "D-", "x--")
"""Of the curves in turn: those that lie on each other are both seen."""
MOST = 4
"""Panels side by side."""


def plot(part: str, rows: Rows, file: Path) -> Path:
    """The part's figures, every panel on logarithmic axes."""
    panels, across, up = PLOTS[part](rows)
    wide = min(len(panels), MOST if len(panels) % MOST == 0 else 3)
    high = -(-len(panels) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(4.4 * wide + 0.6, 3.6 * high), layout="constrained", squeeze=False)
    for number, (place, (title, curves)) in enumerate(zip(axes.flat, panels.items(), strict=True)):
        _panel(place, curves)
        place.set(title=title, xlabel=across[number * len(across) // len(panels)], ylabel=up)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def _panel(place: Axes, curves: Curves) -> None:
    for look, (name, (x, y)) in zip(LOOKS, curves.items(), strict=False):
        place.loglog(x, y, look, markersize=4, alpha=0.8, label=name)
    place.spines[["top", "right"]].set_visible(False)
    if not curves:
        return
    places = sorted({value for x, _ in curves.values() for value in x})
    place.xaxis.set_major_locator(FixedLocator(places))
    place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    place.xaxis.set_minor_locator(NullLocator())
    low, high = place.get_ylim()
    if high < 10 * low:  # a decade at least: what differs by little looks so
        middle = (low * high) ** 0.5
        place.set_ylim(middle / 10**0.5, middle * 10**0.5)
    place.legend(frameon=False, fontsize=7)


def curves(figures: Rows, name: str, x: str, y: str, **where: Any) -> Curves:
    """One curve for each value of ``name``: ``y`` over ``x`` in the figures where all of ``where`` holds."""
    found: Curves = {}
    for row in figures:
        if row[y] and all(row[key] == value for key, value in where.items()):
            xs, ys = found.setdefault(str(row[name]), ([], []))
            xs.append(row[x])
            ys.append(row[y])
    return found


def _equivalence(rows: Rows) -> Drawing:
    rank = max(row["rows"] for row in rows)
    panels = {}
    for dtype in ("float64", "float32", "bfloat16"):
        where = {"dtype": dtype, "rows": rank, "aggregate": "sequential"}
        unavoidable = curves([row | {"name": "unavoidable"} for row in rows if row["solver"] == rows[0]["solver"]],
                             "name", "chunk_size", "unavoidable", **where)  # fmt: skip
        panels[f"{dtype}, R = {rank}"] = curves(rows, "solver", "chunk_size", "error", **where) | unavoidable
    return panels, ("tokens a chunk",), "error against the recurrence"


def _complexity(rows: Rows) -> Drawing:
    quantities = ("operations", "stages", "serial", "memory")
    rank, chunk = 4, 64
    over_chunk = {f"{y}, R = {rank}": curves(rows, "solver", "chunk", y, rows=rank) for y in quantities}
    over_rank = {f"{y}, C = {chunk}": curves(rows, "solver", "rows", y, chunk=chunk) for y in quantities}
    return over_chunk | over_rank, ("tokens a chunk", "rows a token"), "counted"


def _accuracy(rows: Rows) -> Drawing:
    panels = {
        f"{keys} keys, {dtype}, R = 1": curves(rows, "inverse", "chunk", "error", keys=keys, dtype=dtype, rows=1)
        for dtype, keys in product(("float32", "bfloat16"), ("random", "correlated"))
    }
    return panels, ("tokens a chunk",), "relative error"


def _structure(rows: Rows) -> Drawing:
    panels: Panels = {}
    for panel in dict.fromkeys(row["property"].split(",")[0] for row in rows):
        some = [row for row in rows if row["property"].startswith(panel)]
        panels[panel] = curves(some, "property", "size", "error")
    return panels, ("pieces", "tokens", "tokens", "|tr ω|"), "relative error"


def _signatures(rows: Rows) -> Drawing:
    return {"two straight lines": curves(rows, "route", "steps", "error")}, ("cells a side",), "relative error"


def _convergence(rows: Rows) -> Drawing:
    return {"a driver that turns": curves(rows, "scheme", "steps", "error")}, ("steps",), "relative error"


def _runtime(rows: Rows) -> Drawing:
    panels = {
        f"{device}, R = {rank}": curves(rows, "solver", "chunk", "milliseconds", device=device, rows=rank)
        for device, rank in sorted({(row["device"], row["rows"]) for row in rows})
    }
    return panels, ("tokens a chunk",), "milliseconds, forward"


def _aggregation(rows: Rows) -> Drawing:
    panels = {
        device: curves(rows, "aggregate", "length", "milliseconds", device=device)
        for device in sorted({row["device"] for row in rows})
    }
    return panels, ("tokens",), "milliseconds, forward"


PLOTS: dict[str, Callable[[Rows], Drawing]] = {
    "structure": _structure,
    "equivalence": _equivalence,
    "complexity": _complexity,
    "accuracy": _accuracy,
    "signatures": _signatures,
    "convergence": _convergence,
    "runtime": _runtime,
    "aggregation": _aggregation,
}
