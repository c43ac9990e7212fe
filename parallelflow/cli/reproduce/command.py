"""`parallelflow reproduce`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Part(StrEnum):
    """The parts of the reproduction."""

    structure = "structure"
    equivalence = "equivalence"
    complexity = "complexity"
    accuracy = "accuracy"
    signatures = "signatures"
    convergence = "convergence"
    runtime = "runtime"
    aggregation = "aggregation"


def reproduce(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes: under three minutes on two cores.")] = False,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where report.md, the figures and the plots go.")
    ] = Path("runs/reproduce"),
    only: Annotated[list[Part] | None, typer.Option(help="Run only this part; may be given more than once.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the folder already holds.")] = False,
) -> None:
    """Every claim of the ParallelFlow paper, measured: a report with tables, plots and verdicts.

    A part that is finished is kept in the folder, and a later run takes it from there: stop and go on at will.
    """
    from parallelflow.cli.reproduce.run import ReproductionFailed, run_reproduction

    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"got {output}, which is a file, expected a folder", param_hint="--output")
    try:
        run_reproduction(output, parts=[part.value for part in only or Part], quick=quick, fresh=fresh)
    except ReproductionFailed as failure:
        typer.echo(f"The reproduction failed: {failure}", err=True)
        raise typer.Exit(1) from None
