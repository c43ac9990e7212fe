"""`parallelflow doctor`."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

OPTIONAL = {
    "triton": "GPU kernels",
    "transformers": "Hugging Face models (extra: hf)",
    "matplotlib": "plots (extra: cli)",
}


def doctor() -> None:
    """What this machine can run: versions, devices, a check of the engine against a recurrence, every model's backend.

    Exits with 1 when the engine does not give the recurrence's numbers here.
    """
    console = Console()
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_row("parallelflow", _installed("parallelflow") or "from source")
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    table.add_row("torch", torch.__version__)
    table.add_row("processor", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for name in _accelerators():
        table.add_row("accelerator", name)
    for package, purpose in OPTIONAL.items():
        state = _importable(package)
        table.add_row(package, f"{state}  [dim]{purpose}[/dim]")
    checks = [(name, check()) for name, check in CHECKS.items()]
    for name, (passed, finding) in checks:
        verdict = "[green]passed[/green]" if passed else "[red]failed[/red]"
        table.add_row(name, f"{verdict}  [dim]{finding}[/dim]")
    console.print(table)
    console.print(_backends())
    if not all(passed for _, (passed, _) in checks):
        raise typer.Exit(1)


def _backends() -> Table:
    """Which backend every model takes on this machine, in 16 bits on a GPU and 32 on a CPU, and why no faster one."""
    from parallelflow.cli.backends import backend_of, refusal_of, tiers
    from parallelflow.cli.demo.inputs import Sizes, draw_inputs
    from parallelflow.cli.demo.recurrences import MODELS

    gpu = torch.cuda.is_available()
    place, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("model", "backend", "why no faster one"):
        table.add_column(heading)
    for model in MODELS:
        name = model.__name__
        drawn = draw_inputs(name, Sizes(batch=1, length=64, heads=2, key_size=64, value_size=64), dtype)
        inputs = {key: tensor.to(place) for key, tensor in drawn.items()}
        chosen = backend_of(name, inputs)
        faster = list(tiers(place))
        faster = faster[: faster.index(chosen)] if chosen in faster else faster
        table.add_row(name, chosen, "; ".join(f"{each}: {refusal_of(name, each, inputs)}" for each in faster))
    return table


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _importable(package: str) -> str:
    found = _installed(package)
    if found is None:
        return "not installed"
    try:
        importlib.import_module(package)
    except Exception as error:  # whatever is wrong with it, the doctor reports it
        return f"[red]{found} does not import: {error}[/red]"
    return found


def _accelerators() -> list[str]:
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"sm_{device.major}{device.minor}"
            found.append(f"cuda:{index} {device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}")
        return found
    if torch.backends.mps.is_available():
        return ["mps (Apple)"]
    return ["none"]


def _agreement() -> tuple[bool, str]:
    """The gated delta rule in float64 against its recurrence: output, state and gradients."""
    from parallelflow.cli.demo.agreement import AGREEMENT, agreement_errors

    worst = max(agreement_errors("gated_delta_rule"))
    return worst <= AGREEMENT, f"gated_delta_rule against its recurrence in float64: {worst:.0e}"


CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {"agreement": _agreement}
