"""The reproduction, part by part; what is finished is on disk and is not measured twice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from parallelflow.cli.demo.run import machine
from parallelflow.cli.reproduce.parts import PARTS
from parallelflow.cli.reproduce.plots import plot
from parallelflow.cli.reproduce.report import failures, write_report


class ReproductionFailed(Exception):
    """A claim that must hold did not."""


def run_reproduction(directory: Path, *, parts: Iterable[str], quick: bool, fresh: bool = False) -> dict[str, Any]:
    """Measures the parts that ``directory`` does not hold yet, and writes plots and ``report.md`` of all it holds.

    A part is one file, ``<part>.json``, written when it is complete. One that was measured the other way (quick or
    not), or on another machine, is measured again, as all are with ``fresh``.

    Raises:
        ReproductionFailed: a result is not the recurrence's, or an order of convergence is missed.
    """
    console = Console()
    directory.mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("{task.description:<14}"), BarColumn(bar_width=32), TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"), console=console,
    ) as progress:  # fmt: skip
        for part in parts:
            task = progress.add_task(part, total=None, note="")
            file = directory / f"{part}.json"
            if not fresh and _holds(file, quick):
                progress.update(task, total=1, completed=1, note="from an earlier run")
                continue
            start = time.perf_counter()
            rows: list[dict[str, Any]] = []
            for row in PARTS[part](quick):
                rows.append(row)
                progress.update(task, note=f"{len(rows)} figures")
            measured = {"quick": quick, "seconds": time.perf_counter() - start, "machine": machine_here(), "rows": rows}
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(file)
            progress.update(task, total=1, completed=1)
    held = {part: _read(directory / f"{part}.json") for part in PARTS if (directory / f"{part}.json").exists()}
    for part, figures in held.items():
        plot(part, figures["rows"], directory / f"{part}.png")
    report = write_report(held, directory / "report.md")
    console.print(f"[dim]The report: {report}[/dim]")
    if missed := failures(held):
        raise ReproductionFailed("; ".join(missed))
    return held


def machine_here() -> dict[str, Any]:
    """What the figures were measured on, the GPU's name too."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return machine() | {"gpu": gpu}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _holds(file: Path, quick: bool) -> bool:
    if not file.exists():
        return False
    held = _read(file)
    return held["quick"] == quick and held["machine"] == machine_here()
