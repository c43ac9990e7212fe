"""Running results: at every position the answer is that of all tokens up to there."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.tasks.base import IGNORED, Task
from parallelflow.tasks.groups import Group


class Words(Task):
    """The word problem of a group: tokens are elements ``g_t``, the label is the number of ``g_t ∘ … ∘ g_1``.

    Source: Merrill, Petty and Sabharwal 2024, *The Illusion of State in State-Space Models*, arXiv 2404.08819.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.vocabulary = self.classes = len(group.elements)
        self.chance = 1 / self.classes

    def tokens(self, count: int, length: int, generator: torch.Generator | None) -> Tensor:
        return torch.randint(self.vocabulary, (count, length), generator=generator)

    def labels(self, tokens: Tensor) -> Tensor:
        found = [tokens[:, 0]]
        for token in tokens.unbind(1)[1:]:
            found.append(self.group.product[token, found[-1]])
        return torch.stack(found, 1)


def parity() -> Words:
    """The word problem of the group of two elements: whether the number of ones so far is odd."""
    return Words(Group.of([(0, 1), (1, 0)]))


class ModularArithmetic(Task):
    """``((x_1 ∘ x_2) ∘ x_3) …`` modulo m, operators + - × and digits in turn; asked after every digit.

    Tokens 0 … m - 1 are digits, m, m + 1, m + 2 the operators; operations are made from left to right, without
    precedence or brackets. Source: the task "modular arithmetic" of Delétang et al. 2023, *Neural Networks and the
    Chomsky Hierarchy*, arXiv 2207.02098; theirs gives × precedence, and asks once, at the end.
    """

    def __init__(self, modulus: int = 5) -> None:
        self.modulus, self.vocabulary, self.classes = modulus, modulus + 3, modulus
        self.chance = 1 / modulus  # nearly: a product is 0 more often than any other number

    def tokens(self, count: int, length: int, generator: torch.Generator | None) -> Tensor:
        drawn = torch.randint(self.modulus, (count, length), generator=generator)
        drawn[:, 1::2] = self.modulus + torch.randint(3, (count, length // 2), generator=generator)
        return drawn

    def labels(self, tokens: Tensor) -> Tensor:
        labels = torch.full_like(tokens, IGNORED)
        result = labels[:, 0] = tokens[:, 0]
        for position in range(2, tokens.shape[1], 2):
            digit, operator = tokens[:, position], tokens[:, position - 1] - self.modulus
            choices = torch.stack((result + digit, result - digit, result * digit), 1)
            result = choices.gather(1, operator[:, None])[:, 0] % self.modulus
            labels[:, position] = result
        return labels
