"""What every task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.checks import expect_kind, expect_positive_integer

IGNORED = -100
"""The label of a position where nothing is asked, as ``cross_entropy`` leaves it out."""


class Sequences(NamedTuple):
    """``tokens`` and ``labels``, int64 ``[count, length]``; labels are ``IGNORED`` where nothing is asked."""

    tokens: Tensor
    labels: Tensor


class Task(ABC):
    """A source of random sequences.

    ``vocabulary``: how many tokens there are; ``classes``: how many labels; ``chance``: the best accuracy of an answer
    that looks at no token.
    """

    vocabulary: int
    classes: int
    chance: float

    def draw(self, count: int, length: int, generator: torch.Generator | None = None) -> Sequences:
        """Sequences of the task, on the CPU: the same for the same generator.

        Raises:
            TypeError, ValueError: for sizes that are not positive, or too small for the task.
        """
        expect_positive_integer("count", count)
        expect_positive_integer("length", length)
        if generator is not None:
            expect_kind("generator", generator, torch.Generator, "a torch.Generator or None")
        with torch.device("cpu"):  # as the generator is
            tokens = self.tokens(count, length, generator)
            return Sequences(tokens, self.labels(tokens))

    @abstractmethod
    def tokens(self, count: int, length: int, generator: torch.Generator | None) -> Tensor:
        """Random tokens ``[count, length]``."""

    @abstractmethod
    def labels(self, tokens: Tensor) -> Tensor:
        """The right answers, ``[count, length]``."""
