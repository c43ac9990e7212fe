"""Finite groups of permutations."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

Permutation = tuple[int, ...]


class Group(NamedTuple):
    """``elements``, the identity first; ``product[a, b]``: the number of a ∘ b, first b, then a."""

    elements: tuple[Permutation, ...]
    product: Tensor

    @classmethod
    def of(cls, elements: list[Permutation]) -> Group:
        """Of permutations that are closed under composition, in the order given."""
        number = {element: index for index, element in enumerate(elements)}
        table = [[number[tuple(left[i] for i in right)] for right in elements] for left in elements]
        return cls(tuple(elements), torch.tensor(table, device="cpu"))


def symmetric(degree: int) -> Group:
    """All permutations of so many things: S3, S4, S5 have 6, 24, 120 elements."""
    return Group.of(list(itertools.permutations(range(degree))))


def alternating(degree: int) -> Group:
    """The even ones: A5 has 60 elements and is the smallest group that is not solvable."""
    return Group.of([each for each in itertools.permutations(range(degree)) if not _is_odd(each)])


def _is_odd(permutation: Permutation) -> bool:
    inversions = sum(a > b for a, b in itertools.combinations(permutation, 2))
    return inversions % 2 == 1
