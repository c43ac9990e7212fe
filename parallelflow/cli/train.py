"""`parallelflow train`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parallelflow.checks import device_of


def train(
    data: Annotated[Path, typer.Option(help="A file, or a folder: all files below it.")],
    config: Annotated[Path, typer.Option(help="The recipe, YAML: see examples/small.yaml.")],
    output: Annotated[Path, typer.Option(help="Where checkpoints, log and plot go.")] = Path("runs/train"),
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; without one, bytes are tokens.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one.")] = "auto",
) -> None:
    """Train a language model on files. Killed at any moment, the same command with --resume goes on."""
    extra_needed()
    from parallelflow.training import CheckpointError, Recipe, open_text, open_tokens
    from parallelflow.training import train as run

    console = Console()
    try:
        recipe = Recipe.load(config)
        tokens = open_tokens(tokenizer)
        if any(path.exists() and not path.is_dir() for path in (output, *output.parents)):
            raise ValueError(f"output: got {output}, expected a folder, not a file or what is below one")
        text = open_text(data, tokens, recipe, output / "tokens")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output: got {output}, which cannot be made: {error.strerror}") from None
        place = chosen_device(device)
        if tokenizer is not None and tokenizer.resolve() != (output / "tokenizer.json").resolve():
            shutil.copyfile(tokenizer, output / "tokenizer.json")
        parts = f"{len(text.files)} file{'s' if len(text.files) > 1 else ''}"
        console.print(f"{text.total:,} tokens in {parts}, vocabulary {tokens.size:,}, on {place}")
        with Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
        ) as progress:
            bar = progress.add_task("training", total=recipe.steps, note="")
            held_out = ""

            def report(entry: dict[str, Any]) -> None:
                nonlocal held_out
                if "held_out_loss" in entry:
                    held_out = f", held out {entry['held_out_loss']:.3f}"
                speed = f"{entry['tokens_per_second']:,.0f} tokens/s"
                progress.update(bar, completed=entry["step"], note=f"loss {entry['loss']:.3f}{held_out}, {speed}")

            def warn(message: str) -> None:
                console.print(f"[yellow]not used:[/yellow] {message}")

            def begin(step: int) -> None:
                if step:
                    console.print(f"going on after step {step}" if step < recipe.steps else "nothing is left to do")
                progress.reset(bar, completed=step)

            model = run(recipe, text, output, device=place, resume=resume, report=report, warn=warn, begin=begin)
    except (TypeError, ValueError, CheckpointError, FloatingPointError, OSError) as error:
        typer.echo(f"parallelflow train: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("parallelflow train: stopped; the same command with --resume goes on", err=True)
        raise typer.Exit(130) from None
    console.print(f"{model.num_parameters():,} parameters; loss: {plot(output / 'log.jsonl', output / 'loss.png')}")
    console.print(f"Say something with it: parallelflow generate {output} --prompt 'Once'")


def extra_needed() -> None:
    """Exits where the packages of the extra `hf` are not installed."""
    for package in ("transformers", "safetensors", "yaml"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise SystemExit(
                f"parallelflow: language models need {package}, which is not installed. "
                "Install the extras: pip install 'parallelflow[cli,hf]'"
            ) from None


def chosen_device(name: str) -> torch.device:
    """ValueError for one that is not there; for ``auto`` a GPU where there is one."""
    return device_of(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def plot(log: Path, file: Path) -> Path:
    """The losses of a log, in bits a token over steps."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([x["step"] for x in entries], [x["loss"] / math.log(2) for x in entries], alpha=0.5, label="training")
    held_out = [x for x in entries if "held_out_loss" in x]
    axes.plot([x["step"] for x in held_out], [x["held_out_loss"] / math.log(2) for x in held_out], label="held out")
    axes.set(xlabel="step", ylabel="bits a token")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    return file
