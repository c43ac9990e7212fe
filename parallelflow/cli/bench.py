"""`parallelflow bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from parallelflow import functional
from parallelflow.checks import expect_choice
from parallelflow.cli.backends import backend_of
from parallelflow.cli.demo.inputs import Sizes, draw_inputs
from parallelflow.cli.demo.recurrences import MODELS
from parallelflow.cli.train import chosen_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bench(
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 2048,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=1, help="Of keys and values.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="The best of so many is shown.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; auto takes a GPU where there is one.")] = "auto",
) -> None:
    """Time every model on this machine, with the backend that is chosen here."""
    try:
        expect_choice("dtype", dtype, DTYPES)
        place = chosen_device(device)
    except ValueError as error:
        typer.echo(f"parallelflow bench: {error}", err=True)
        raise typer.Exit(2) from None
    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("model", "backend", "forward", "training", "tokens/s, training"):
        table.add_column(name, justify="left" if name in ("model", "backend") else "right", no_wrap=True)
    sizes = Sizes(batch=1, length=length, heads=heads, key_size=head_dim, value_size=head_dim)
    for recurrence in MODELS:
        name = recurrence.__name__
        inputs = {key: x.to(place) for key, x in draw_inputs(name, sizes, DTYPES[dtype]).items()}
        leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
        function = getattr(functional, name)

        def forward(function: Callable = function, inputs: dict = inputs) -> None:
            with torch.no_grad():
                function(**inputs)

        def training(function: Callable = function, leaves: dict = leaves) -> None:
            output = function(**leaves).output
            torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))

        times = [milliseconds(call, place, repeats) for call in (forward, training)]
        table.add_row(
            name, backend_of(name, inputs), *(f"{x:.2f} ms" for x in times), f"{1000 * length / times[1]:,.0f}"
        )
    console.print(table)
    console.print(f"[dim]{place}, {dtype}, B = 1, T = {length}, {heads} heads, K = V = {head_dim}, best of {repeats}")


def milliseconds(call: Callable[[], None], place: torch.device, repeats: int) -> float:
    """The best of some calls after a first one, which may compile: what else the machine does makes a call slower."""
    from time import perf_counter

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    call()
    times = []
    for _ in range(repeats):
        wait()
        start = perf_counter()
        call()
        wait()
        times.append(1000 * (perf_counter() - start))
    return min(times)
