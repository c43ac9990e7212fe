"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable

from parallelflow.checks import expect_choice
from parallelflow.tasks.base import Task
from parallelflow.tasks.groups import alternating, symmetric
from parallelflow.tasks.recall import AssociativeRecall
from parallelflow.tasks.words import CycleNavigation, EvenPairs, ModularArithmetic, Words, parity

TASKS: dict[str, Callable[[], Task]] = {
    "parity": parity,
    "even_pairs": EvenPairs,
    "cycle_navigation": CycleNavigation,
    "modular_arithmetic": ModularArithmetic,
    "S3": lambda: Words(symmetric(3)),
    "S4": lambda: Words(symmetric(4)),
    "A5": lambda: Words(alternating(5)),
    "S5": lambda: Words(symmetric(5)),
    "associative_recall": AssociativeRecall,
}


def make_task(name: str) -> Task:
    """The task of that name; ValueError for one that is not in ``TASKS``."""
    expect_choice("task", name, TASKS)
    return TASKS[name]()
