"""The demonstration: three parts, each with a progress bar, a table on the screen and files in a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from parallelflow.cli.demo import agreement, plots, recurrences, state_tracking, training
from parallelflow.cli.demo.corpus import STANDARD_LIBRARY, Corpus
from parallelflow.cli.machine import machine

Item = TypeVar("Item")

PARTS = ("models", "language", "tracking")


class DemoFailed(Exception):
    """A result is not what it has to be; the message says which."""


def run_demo(corpus: Corpus | None, directory: Path, *, parts: Iterable[str] = PARTS, seed: int = 0) -> dict[str, Any]:
    """Runs the parts, writes PNG, text and `results.json` into `directory` and returns what the JSON holds.

    Args:
        corpus: what the language model reads; None when `parts` leaves it out.
        directory: made if it is missing; files of an earlier run are overwritten.
        parts: of `PARTS`.
        seed: of the random weights and the data.

    Raises:
        DemoFailed: at the end, when a model disagrees with its recurrence, the loss on the standard library does not
            fall below what counting pairs of bytes achieves, or two Householders do not reach 99 %.
    """
    directory.mkdir(parents=True, exist_ok=True)
    console = Console()
    start = time.perf_counter()
    results: dict[str, Any] = {"machine": machine(), "seed": seed}
    failures: list[str] = []
    if "models" in parts:
        results |= _models(console, directory, failures)
    if "language" in parts:
        assert corpus is not None
        results["language_model"] = _language(console, directory, corpus, seed, failures)
    if "tracking" in parts:
        results["state_tracking"] = _tracking(console, directory, seed, failures)
    results["seconds"] = time.perf_counter() - start
    file = directory / "results.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"[dim]{results['seconds']:.0f} s. Every figure: {file}[/dim]")
    if failures:
        raise DemoFailed("; ".join(failures))
    return results


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(bar_width=32),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
    )


def _collect(
    console: Console, title: str, items: Iterable[Item], total: int, name: Callable[[Item], str]
) -> list[Item]:
    """Every item of a generator that takes its time, under a progress bar."""
    collected = []
    with _progress(console) as progress:
        task = progress.add_task(title, total=total, note="")
        for item in items:
            collected.append(item)
            progress.update(task, advance=1, note=name(item))
        progress.update(task, note="")
    return collected


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(Text(text, style="bold"), align="left")


def _models(console: Console, directory: Path, failures: list[str]) -> dict[str, Any]:
    _heading(console, "Every model is its recurrence, sooner")
    models = _collect(
        console, "models", agreement.measure_models(), total=len(recurrences.MODELS), name=lambda x: x.model
    )
    lengths = _collect(
        console, "lengths", agreement.measure_lengths(), len(agreement.LENGTHS), lambda x: f"T = {x.length:,}"
    )
    console.print(model_table(models))
    (directory / "models.md").write_text(model_markdown(models), encoding="utf-8")
    console.print(f"[dim]Time against T: {plots.plot_lengths(lengths, directory / 'time_against_length.png')}[/dim]")
    wrong = [x.model for x in models if not x.agrees]
    if wrong:
        failures.append(f"off their recurrence by more than {agreement.AGREEMENT:g}: {', '.join(wrong)}")
    return {
        "models": [asdict(x) | x.speedups() for x in models],
        "lengths": [asdict(x) for x in lengths],
    }


HEADINGS = ("model", "error", "gradient", "forward", "speed-up", "training", "speed-up")


def model_cells(figures: agreement.ModelFigures) -> tuple[str, ...]:
    """A row of the table, under `HEADINGS`."""
    return (
        figures.model,
        f"{max(figures.output_error, figures.state_error):.0e}",
        f"{figures.gradient_error:.0e}",
        f"{figures.forward_ms:.0f} ms",
        _ratio(figures.forward_speedup),
        f"{figures.training_ms:.0f} ms",
        _ratio(figures.training_speedup),
    )


def _ratio(value: float) -> str:
    return f"{value:.1f} ×" if value < 10 else f"{value:.0f} ×"


def model_caption() -> str:
    """What the table was measured with."""
    exact, timed = agreement.EXACT, agreement.TIMED
    return (
        f"Relative errors of output and state, and of gradients: float64, T = {exact.length}. Times, and speed-ups "
        f"over the recurrence: float32, T = {timed.length:,}, {timed.heads} heads of {timed.key_size}, "
        f"{torch.get_num_threads()} threads; training is forward and backward."
    )


def _table(headings: Sequence[str], caption: str) -> Table:
    """Names on the left, numbers on the right."""
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=f"\n{caption}", caption_justify="left"
    )
    for heading in headings:
        name = heading == headings[0]
        table.add_column(heading, justify="left" if name else "right", no_wrap=name)
    return table


def model_table(models: Iterable[agreement.ModelFigures]) -> Table:
    """Agreement with the recurrence and speed-up over it, for the screen."""
    table = _table(HEADINGS, model_caption())
    for figures in models:
        table.add_row(*model_cells(figures), style=None if figures.agrees else "red")
    return table


def model_markdown(models: Iterable[agreement.ModelFigures]) -> str:
    """The same table in Markdown."""
    rows = [HEADINGS, ("---",) + ("---:",) * (len(HEADINGS) - 1), *(model_cells(figures) for figures in models)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{model_caption()}\n"


def _language(console: Console, directory: Path, corpus: Corpus, seed: int, failures: list[str]) -> dict[str, Any]:
    _heading(console, "A language model that reads bytes")
    recipe = training.Recipe(seed=seed)
    with _progress(console) as progress:
        task = progress.add_task(f"reading {corpus.source}", total=1.0, note="")
        model, figures = training.train(
            corpus, recipe, progress=lambda done, text: progress.update(task, completed=done, note=text)
        )
    training.speak(model, corpus, recipe, figures)
    console.print(
        f"{figures.parameters:,} parameters, {figures.steps} steps of {recipe.batch} × {recipe.length} bytes: "
        f"{figures.held_out_loss[0]:.2f} → [bold]{figures.held_out_loss[-1]:.2f}[/bold] bits a byte on held-out text "
        f"(counting single bytes {figures.single_byte_entropy:.2f}, pairs {figures.byte_pair_entropy:.2f})."
    )
    said = Text(_printable(figures.prompt), style="dim") + Text(_printable(figures.sample))
    console.print(Panel(said, title="its continuation of held-out text", title_align="left", box=box.ROUNDED))
    console.print(
        f"Generated byte by byte, {figures.bytes_per_second:.0f} a second, carrying "
        f"{figures.memory_bytes / 1024:.0f} KiB at every length; logits within {figures.step_agreement:.0e} of the "
        "chunked form's."
    )
    (directory / "sample.txt").write_text(figures.prompt + figures.sample, encoding="utf-8")
    console.print(f"[dim]Loss: {plots.plot_loss(figures, directory / 'loss.png')}[/dim]")
    if corpus.source == STANDARD_LIBRARY and figures.held_out_loss[-1] >= figures.byte_pair_entropy:
        failures.append(
            f"the language model ended at {figures.held_out_loss[-1]:.2f} bits a byte, "
            f"counting pairs achieves {figures.byte_pair_entropy:.2f}"
        )
    return asdict(figures) | {"recipe": asdict(recipe)}


def _printable(text: str) -> str:
    """Text that cannot disturb a terminal: a dot for every control character but line ends and tabs."""
    return "".join(x if x.isprintable() or x in "\n\t" else "·" for x in text)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For operations too small to share: no slower, and the same bits whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tracking(console: Console, directory: Path, seed: int, failures: list[str]) -> list[dict[str, Any]]:
    _heading(console, "State tracking: products of permutations of three things")
    recipe = state_tracking.Recipe(seed=seed)
    results = []
    with _progress(console) as progress, _one_thread():
        for contender in state_tracking.CONTENDERS:
            task = progress.add_task(contender.name, total=1.0, note="")

            def advance(done: float, text: str, task: Any = task) -> None:
                progress.update(task, completed=done, note=text)

            results.append(state_tracking.train(contender, recipe, progress=advance))
    longer = 4 * recipe.length
    table = _table(
        ("layer", "size", f"{recipe.length} long", f"{longer} long", f"position {longer}"),
        f"Right answers; trained on at most {recipe.length} permutations; guessing gives 17 %.",
    )
    for x in results:
        rates = (x.accuracy_trained_length, x.accuracy, x.accuracy_last_position)
        table.add_row(x.name, f"{x.parameters:,}", *(f"{rate:.1%}" for rate in rates))
    console.print(table)
    plot = plots.plot_tracking(results, recipe.length, directory / "state_tracking.png")
    console.print(f"[dim]By position: {plot}[/dim]")
    if results[0].accuracy < 0.99:
        failures.append(f"two Householders follow {results[0].accuracy:.1%} of the products, expected 99 %")
    return [asdict(x) for x in results]
