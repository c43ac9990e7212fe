"""State tracking and recall: sequences drawn at random, with labels that are exact.

``make_task(name)`` gives a ``Task``; ``task.draw(count, length, generator)`` gives tokens and labels
``[count, length]``, int64. What does not fit raises a TypeError or ValueError that names the argument.
"""

from parallelflow.tasks.base import IGNORED, Task
from parallelflow.tasks.groups import Group, alternating, symmetric
from parallelflow.tasks.recall import AssociativeRecall
from parallelflow.tasks.registry import TASKS, make_task
from parallelflow.tasks.words import CycleNavigation, EvenPairs, ModularArithmetic, Words, parity

__all__ = [
    "IGNORED",
    "TASKS",
    "AssociativeRecall",
    "CycleNavigation",
    "EvenPairs",
    "Group",
    "ModularArithmetic",
    "Task",
    "Words",
    "alternating",
    "make_task",
    "parity",
    "symmetric",
]
