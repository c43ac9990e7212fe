"""Looking up what was said."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.checks import expect_positive_integer
from parallelflow.tasks.base import IGNORED, Task


class AssociativeRecall(Task):
    """Pairs of a key and a value, then keys in a random order: the label at each of them is its value.

    Of ``length`` tokens the first ``2 n`` are n pairs with different keys, the last n ask for all of them, n =
    ``length // 3`` but at most ``keys``; what is between is filled with the last token of the vocabulary. Tokens
    0 … keys - 1 are keys, the next ``values`` values; labels count values from 0.
    Source: Arora et al. 2024, *Zoology*, arXiv 2312.04927, with every pair asked once.
    """

    def __init__(self, keys: int = 32, values: int = 32) -> None:
        expect_positive_integer("keys", keys)
        expect_positive_integer("values", values)
        self.keys, self.values = keys, values
        self.vocabulary, self.classes, self.chance = keys + values + 1, values, 1 / values

    def tokens(self, count: int, length: int, generator: torch.Generator | None) -> Tensor:
        if length < 3:
            raise ValueError(f"length: got {length}, expected at least 3: a key, its value and a question")
        pairs = min(length // 3, self.keys)
        key = torch.rand(count, self.keys, generator=generator).argsort(1)[:, :pairs]
        value = self.keys + torch.randint(self.values, (count, pairs), generator=generator)
        asked = key.gather(1, torch.rand(count, pairs, generator=generator).argsort(1))
        filler = torch.full((count, length - 3 * pairs), self.vocabulary - 1)
        return torch.cat((torch.stack((key, value), 2).flatten(1), filler, asked), 1)

    def labels(self, tokens: Tensor) -> Tensor:
        pairs = min(tokens.shape[1] // 3, self.keys)
        key, value = tokens[:, : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]
        asked = tokens[:, -pairs:]
        place = (asked[:, :, None] == key[:, None, :]).long().argmax(2)
        labels = torch.full_like(tokens, IGNORED)
        labels[:, -pairs:] = value.gather(1, place) - self.keys
        return labels
