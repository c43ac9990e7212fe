"""The table and the plot of what ``benchmarks.state_tracking`` found."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from parallelflow.tasks import TASKS, make_task

SUITE = ("parity", "even_pairs", "cycle_navigation", "modular_arithmetic")
"""The tasks of the formal-language suite that is published for some of the layers."""
PUBLISHED = {
    "what": "formal-language suite, trained to length 40 and tested to 256, average accuracy in %",
    "DeltaNet": 62.5,
    "DeltaNet, negative eigenvalues": 77.7,
    "Gated DeltaProduct, negative eigenvalues": 80.7,
    "DPLR-SLiCE, r = 4": 85.1,
}
"""As published, at other sizes and after longer training: beside the averages, not among them."""
BESIDE = {
    "DeltaNet": "DeltaNet",
    "DeltaNet, negative eigenvalues": "DeltaNet, negative eigenvalues",
    "Gated DeltaProduct, 2 factors, negative eigenvalues": "Gated DeltaProduct, negative eigenvalues",
    "Low-rank flow, R = 4": "DPLR-SLiCE, r = 4",
}
"""The published model that stands beside a layer; the last is one of the same rank, not the same."""


def accuracies(content: dict[str, Any], layer: str, task: str, key: str = "longer") -> list[float]:
    """In %, one a seed."""
    return [100 * run[key] for run in content["runs"] if (run["layer"], run["task"]) == (layer, task)]


def present(content: dict[str, Any], layers: list[str]) -> tuple[list[str], list[str]]:
    """The layers and tasks that were run."""
    ran = {run["layer"] for run in content["runs"]}, {run["task"] for run in content["runs"]}
    return [name for name in layers if name in ran[0]], [name for name in TASKS if name in ran[1]]


def suite(content: dict[str, Any], layer: str) -> float | None:
    """The average over the suite's tasks; None where one is missing."""
    means = [statistics.mean(found) for task in SUITE if (found := accuracies(content, layer, task))]
    return statistics.mean(means) if len(means) == len(SUITE) else None


def table(content: dict[str, Any], layers: list[str]) -> str:
    """Accuracy in % at the longer length in Markdown, mean and range over seeds; the suite's average, and published."""
    layers, tasks = present(content, layers)
    lines = ["| layer | " + " | ".join([*tasks, "suite", "published"]) + " |", "|---|" + "---:|" * (len(tasks) + 2)]
    for layer in layers:
        cells = []
        for task in tasks:
            own = accuracies(content, layer, task)
            spread = f" ({min(own):.0f}–{max(own):.0f})" if own and max(own) - min(own) >= 1 else ""
            cells.append(f"{statistics.mean(own):.0f}{spread}" if own else "–")
        average = suite(content, layer)
        cells += ["–" if average is None else f"{average:.1f}", str(content["published"].get(BESIDE.get(layer), ""))]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    chances = [f"{100 * make_task(task).chance:.0f}" for task in tasks]
    guessed = f"{statistics.mean(100 * make_task(task).chance for task in SUITE):.1f}"
    return "\n".join([*lines, "| *guessing* | " + " | ".join([*chances, guessed, ""]) + " |"])


def circumstances(content: dict[str, Any]) -> str:
    """What the table's figures are of, in a sentence."""
    settings, runs = content["settings"], content["runs"]
    sizes, batch, seeds = settings["sizes"], settings["recipe"]["batch"], len({run["seed"] for run in runs})
    parameters = round(statistics.mean(run["parameters"] for run in runs) / 1000)
    return (
        f"{settings['machine']}, {len(runs)} trainings of {settings['steps']:,} steps of {batch} sequences,"
        f" {seeds} seed{'s' if seeds > 1 else ''}; {parameters:,} thousand parameters, width {sizes['width']},"
        f" {sizes['depth']} blocks, {sizes['heads']} heads. Right answers in %, mean (and range) over seeds; *suite* is"
        " the mean of the first four tasks, *published* that of such a model on the formal-language suite that they are"
        " taken from."
    )


def rendered(page: str, content: dict[str, Any], layers: list[str]) -> str:
    """The page with the figures between its marks."""
    begin, end = "<!-- state tracking -->\n", "<!-- /state tracking -->"
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}{circumstances(content)}\n\n{table(content, layers)}\n{end}{after}"


def plot(content: dict[str, Any], layers: list[str], file: Path) -> None:
    """Accuracy at the longer length: layers by tasks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, tasks = present(content, layers)
    if not layers:
        return
    figure = Figure(figsize=(4.6 + 0.8 * len(tasks), 0.36 * len(layers) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    none = [float("nan")]
    means = [[statistics.mean(accuracies(content, layer, task) or none) for task in tasks] for layer in layers]
    axes.imshow(means, vmin=0, vmax=100, aspect="auto", cmap="viridis")
    for row, column in itertools.product(range(len(layers)), range(len(tasks))):
        mean = means[row][column]
        shade = "black" if mean > 60 else "white"
        axes.text(column, row, f"{mean:.0f}" if mean == mean else "", ha="center", va="center", color=shade)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    figure.suptitle("right answers in %, on sequences longer than any that was trained: mean over seeds", fontsize=10)
    figure.savefig(file, dpi=150)
