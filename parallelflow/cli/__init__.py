"""The command line: `parallelflow --help`.  Needs the extra `cli` (typer, rich, matplotlib)."""

from __future__ import annotations

try:
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"parallelflow: the command line needs {missing.name}, which is not installed. "
        "Install the extra: pip install 'parallelflow[cli]'"
    ) from None

from parallelflow.cli.bench import bench
from parallelflow.cli.demo.command import demo
from parallelflow.cli.doctor import doctor
from parallelflow.cli.generate import generate
from parallelflow.cli.reproduce.command import reproduce
from parallelflow.cli.train import train

app = typer.Typer(
    name="parallelflow",
    help="Every linear-attention model as one low-rank flow.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(reproduce)
app.command()(doctor)
app.command()(bench)
app.command()(train)
app.command()(generate)


@app.callback()
def _root() -> None:
    """Every linear-attention model as one low-rank flow."""
