"""`python -m parallelflow.cli`."""

from parallelflow.cli import app

app()
