"""The plots of the demonstration, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from parallelflow.cli.demo.agreement import TIMED, LengthFigures
from parallelflow.cli.demo.state_tracking import TrackingFigures
from parallelflow.cli.demo.training import LanguageFigures

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9741a", "#2e8b57", "#8a8a8a"
STYLE: Any = {
    "figure.figsize": (7.2, 4.6),
    "figure.dpi": 150,
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
}


def _new(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(layout="constrained")
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, file: Path) -> Path:
    figure.savefig(file)
    plt.close(figure)
    return file


def _note(axes: Axes, text: str, across: float, up: float, colour: str, **where: object) -> None:
    """A label in the curve's colour at a point of it, a little off."""
    axes.annotate(text, (across, up), textcoords="offset points", color=colour, **where)  # type: ignore[arg-type]


def plot_loss(figures: LanguageFigures, file: Path) -> Path:
    """Training and held-out loss against steps, with what counting bytes would achieve."""
    with plt.rc_context(STYLE):
        figure, axes = _new("A byte-level language model on the gated delta rule", "training step", "bits per byte")
        steps = range(1, figures.steps + 1)
        axes.plot(steps, figures.training_loss, color=BLUE, alpha=0.3, linewidth=1, label="training batch")
        axes.plot(
            figures.evaluated_at, figures.held_out_loss, color=BLUE, marker="o", markersize=4, label="held-out text"
        )
        for level, name in (
            (figures.single_byte_entropy, "counting single bytes"),
            (figures.byte_pair_entropy, "counting pairs of bytes"),
        ):
            axes.axhline(level, color=GREY, linestyle="--", linewidth=1.2)
            _note(axes, f"{name}: {level:.2f}", figures.steps, level, GREY, xytext=(0, 4), ha="right")
        last = figures.held_out_loss[-1]
        _note(axes, f"{last:.2f}", figures.steps, last, BLUE, xytext=(0, -30), ha="right", weight="bold")
        axes.set(xlim=(0, figures.steps * 1.01), ylim=(0, None))
        axes.legend(loc="lower left")
        return _save(figure, file)


def plot_lengths(figures: Sequence[LengthFigures], file: Path) -> Path:
    """Forward and backward time against T, log-log."""
    with plt.rc_context(STYLE):
        title = f"Gated delta rule, forward + backward, {TIMED.heads} heads of {TIMED.key_size}, float32, CPU"
        figure, axes = _new(title, "sequence length T", "milliseconds")
        for name, colour, label in (
            ("recurrence_ms", ORANGE, "recurrence"),
            ("softmax_ms", GREY, "softmax attention"),
            ("chunked_ms", BLUE, "chunked"),
        ):
            points = [(x.length, getattr(x, name)) for x in figures if getattr(x, name) is not None]
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=label)
            _note(axes, label, *points[-1], colour, xytext=(8, 0), va="center")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([x.length for x in figures])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(figures[0].length / 1.2, figures[-1].length * 2.4)
        return _save(figure, file)


def plot_tracking(figures: Sequence[TrackingFigures], trained_length: int, file: Path) -> Path:
    """Accuracy against the position, up to four times the length of training."""
    with plt.rc_context(STYLE):
        figure, axes = _new("Products of permutations of three things, one layer", "position", "right answers")
        axes.axvspan(0, trained_length, color="#f1f1f1", zorder=0)
        axes.text(trained_length / 2, 1.045, "trained", ha="center", color=GREY)
        axes.text(trained_length * 1.08, 1.045, "never seen in training", color=GREY)
        for result, colour in zip(figures, (BLUE, ORANGE, GREEN), strict=False):
            positions = range(1, len(result.accuracy_by_position) + 1)
            label = f"{result.name}: {result.accuracy:.1%}"
            axes.plot(positions, result.accuracy_by_position, color=colour, label=label)
        axes.axhline(1 / 6, color=GREY, linestyle="--", linewidth=1.2)
        _note(axes, "guessing", 4 * trained_length, 1 / 6, GREY, xytext=(0, -13), ha="right")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(xlim=(0, 4 * trained_length), ylim=(0, 1.12), yticks=[0, 0.25, 0.5, 0.75, 1.0])
        figure.legend(loc="outside lower left")
        return _save(figure, file)
