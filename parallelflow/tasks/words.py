"""Running results: at every position the answer is that of all tokens up to there."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.checks import expect_positive_integer
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


class EvenPairs(Task):
    """Tokens a and b: is the number of the changes ab and ba so far odd? It is when first and last token differ.

    Source: "even pairs" of Delétang et al. 2023, arXiv 2207.02098, asked at every position.
    """

    vocabulary = classes = 2
    chance = 1 / 2

    def tokens(self, count: int, length: int, generator: torch.Generator | None) -> Tensor:
        return torch.randint(2, (count, length), generator=generator)

    def labels(self, tokens: Tensor) -> Tensor:
        return (tokens != tokens[:, :1]).long()


class CycleNavigation(Task):
    """Steps on a cycle of ``size`` places, token 0 stay, 1 forward, 2 back: the place after every step.

    Source: "cycle navigation" of Delétang et al. 2023, arXiv 2207.02098, asked at every position.
    """

    def __init__(self, size: int = 5) -> None:
        expect_positive_integer("size", size)
        self.vocabulary, self.classes, self.chance = 3, size, 1 / size

    def tokens(self, count: int, length: int, generator: torch.Generator | None) -> Tensor:
        return torch.randint(3, (count, length), generator=generator)

    def labels(self, tokens: Tensor) -> Tensor:
        return torch.tensor([0, 1, -1])[tokens].cumsum(1) % self.classes


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
