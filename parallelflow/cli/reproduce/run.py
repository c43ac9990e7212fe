"""The reproduction, part by part, under progress bars; then the plots and the report of all that there is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from parallelflow.cli.reproduce.parts import PARTS
from parallelflow.cli.reproduce.plots import plot
from parallelflow.cli.reproduce.report import failures, write_report
from parallelflow.cli.reproduce.store import Store, read


class ReproductionFailed(Exception):
    """A claim that must hold did not."""


def run_reproduction(directory: Path, *, parts: Iterable[str], quick: bool, fresh: bool = False) -> dict[str, Any]:
    """Measures what ``directory`` does not hold yet, and writes plots and ``report.md`` of all it holds.

    Figures that were measured the other way (quick or not), or on another machine, are measured again, as all are with
    ``fresh``.

    Raises:
        ReproductionFailed: a result is not the recurrence's, or an order of convergence is missed.
    """
    console = Console()
    directory.mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("{task.description:<13}"), BarColumn(bar_width=32), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"), console=console,
    ) as progress:  # fmt: skip
        for part in parts:
            store = Store(directory, part, quick=quick)
            if fresh:
                store.forget()
            task = progress.add_task(part, total=len(store.settings), note="")
            if store.complete():
                progress.update(task, completed=len(store.settings), note="from an earlier run")
                continue
            for _ in store.measure():
                progress.advance(task)
    write(directory)
    console.print(f"[dim]The report: {directory / 'report.md'}[/dim]")
    held = hold(directory)
    if missed := failures(held):
        raise ReproductionFailed("; ".join(missed))
    return held


def hold(directory: Path) -> dict[str, Any]:
    """The finished parts that a folder has."""
    files = {part: directory / f"{part}.json" for part in PARTS}
    return {part: read(file) for part, file in files.items() if file.exists()}


def write(directory: Path) -> None:
    """The plots and ``report.md`` of the finished parts that a folder has."""
    held = hold(directory)
    for part, figures in held.items():
        plot(part, figures["rows"], directory / f"{part}.png")
    write_report(held, directory / "report.md")
