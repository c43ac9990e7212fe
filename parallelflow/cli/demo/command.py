"""`parallelflow demo`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Part(StrEnum):
    """The parts of the demonstration."""

    models = "models"
    language = "language"
    tracking = "tracking"


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Train the language model on this file (its first 8 MiB) instead of Python's own sources.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the plots, the sample and results.json go.")
    ] = Path("runs/demo"),
    only: Annotated[list[Part] | None, typer.Option(help="Run only this part; may be given more than once.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights and the data.")] = 0,
) -> None:
    """Every model against its recurrence, a language model on real text, and state tracking. Under four minutes.

    The parts: 'models', a table of each model's agreement with its recurrence and its speed-up over it; 'language', a
    byte-level language model that is trained and then writes; 'tracking', products of permutations, which two
    Householder factors a token can follow and one cannot.
    """
    from parallelflow.cli.demo.corpus import read_corpus
    from parallelflow.cli.demo.run import DemoFailed, run_demo

    parts = list(only or Part)
    if data is not None and Part.language not in parts:
        raise typer.BadParameter("is for the part 'language', which --only leaves out", param_hint="--data")
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"got {output}, which is a file, expected a folder", param_hint="--output")
    try:
        corpus = read_corpus(data) if Part.language in parts else None
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("data: "), param_hint="--data") from None
    try:
        run_demo(corpus, output, parts=[part.value for part in parts], seed=seed)
    except DemoFailed as failure:
        typer.echo(f"The demonstration failed: {failure}", err=True)
        raise typer.Exit(1) from None
