"""The table and the plot of what ``benchmarks.state_tracking`` found."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from parallelflow.tasks import TASKS, make_task

PUBLISHED = {
    "what": "formal-language suite, trained to length 40 and tested to 256, average accuracy in %",
    "DeltaNet": 62.5,
    "DeltaNet, negative eigenvalues": 77.7,
    "Gated DeltaProduct, negative eigenvalues": 80.7,
    "DPLR-SLiCE, r = 4": 85.1,
}
"""As published, on other tasks than these: beside the table, not in it."""

LEAST_STEPS = 300
"""Fewer are no training: they are in the results, and blank in table and plot."""


def counted(content: dict[str, Any], layer: str, task: str, key: str) -> list[float]:
    """The accuracies in % over seeds of what was trained at all."""
    own = (run for run in content["runs"] if (run["layer"], run["task"]) == (layer, task))
    return [100 * run[key] for run in own if run.get("steps", 0) >= LEAST_STEPS and key in run]


def present(content: dict[str, Any], layers: list[str]) -> tuple[list[str], list[str]]:
    """The layers and tasks that were run."""
    ran = {run["layer"] for run in content["runs"]}, {run["task"] for run in content["runs"]}
    return [name for name in layers if name in ran[0]], [name for name in TASKS if name in ran[1]]


def table(content: dict[str, Any], layers: list[str]) -> str:
    """Accuracy in % at the longer length in Markdown: mean over seeds, and the best seed where it differs."""
    layers, tasks = present(content, layers)
    lines = ["| layer | " + " | ".join([*tasks, "mean"]) + " |", "|---|" + "---:|" * (len(tasks) + 1)]
    for layer in layers:
        cells, means = [], []
        for task in tasks:
            own = counted(content, layer, task, "longer")
            means.append(statistics.mean(own) if own else None)
            spread = f" ({max(own):.0f})" if own and f"{max(own):.0f}" != f"{means[-1]:.0f}" else ""
            cells.append(f"{means[-1]:.0f}{spread}" if own else "–")
        known = [mean for mean in means if mean is not None]
        cells.append(f"{statistics.mean(known):.0f}" if len(known) == len(tasks) else "–")
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    chances = [100 * make_task(task).chance for task in tasks]
    guessed = [f"{chance:.0f}" for chance in [*chances, statistics.mean(chances)]]
    return "\n".join([*lines, "| *guessing* | " + " | ".join(guessed) + " |"])


def plot(content: dict[str, Any], layers: list[str], file: Path) -> None:
    """Accuracy at the longer length: layers by tasks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, tasks = present(content, layers)
    figure = Figure(figsize=(9, 0.4 * len(layers) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    means = [
        [statistics.mean(counted(content, layer, task, "longer") or [float("nan")]) for task in tasks]
        for layer in layers
    ]
    axes.imshow(means, vmin=0, vmax=100, aspect="auto", cmap="viridis")
    for row, column in itertools.product(range(len(layers)), range(len(tasks))):
        mean = means[row][column]
        shade = "black" if mean > 60 else "white"
        axes.text(column, row, f"{mean:.0f}" if mean == mean else "", ha="center", va="center", color=shade)
    axes.set_xticks(range(len(tasks)), tasks, rotation=20)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_title("right answers in %, on sequences longer than any that was trained: mean over seeds", fontsize=10)
    figure.savefig(file, dpi=150)
