"""Which tokens of which sequences lie on a rank."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Shard:
    """One rank's piece of the line: a *head* that goes on with sequences of the rank before, and the *rest*, sequences
    that begin here.

    ``lanes`` sequences cross a boundary between ranks: B of a regular batch, one of packed sequences. ``continued``:
    there is a head, of ``head`` tokens (0 where an empty shard hands on what it gets); ``unfinished``: the last
    ``lanes`` sequences here go on at the next rank. ``begins`` and ``ends`` are the ranges of sequences whose first and
    last tokens are here; ``rest_starts`` are the boundaries of the packed sequences of the rest, None of a regular
    batch.
    """

    lanes: int
    continued: bool
    unfinished: bool
    head: int
    begins: range
    ends: range
    rest_starts: tuple[int, ...] | None

    @property
    def passing(self) -> bool:
        """Whether what enters also leaves: nothing begins here."""
        return self.continued and self.unfinished and not self.begins

    @property
    def head_ends(self) -> bool:
        """Whether the continued sequences end here."""
        return self.continued and not self.passing

    @staticmethod
    def regular(rank: int, size: int, batch: int, time: int) -> Shard:
        """Of B sequences that all begin on the first rank and end on the last."""
        everyone, first, last = range(batch), rank == 0, rank == size - 1
        return Shard(
            batch, not first, not last, 0 if first else time, everyone if first else range(0),
            everyone if last else range(0), None,
        )  # fmt: skip

    @staticmethod
    def packed(rank: int, lengths: Sequence[int], starts: Sequence[int]) -> Shard:
        """Of sequences packed on a line whose boundaries are ``starts``, cut into ``lengths`` tokens a rank.

        A sequence without tokens is where the next token is; after the last token, on the last rank that has any.
        """
        edges = [0, *accumulate(lengths)]
        first, stop, total = edges[rank], edges[rank + 1], edges[-1]
        holders = [r for r, length in enumerate(lengths) if length] or [len(lengths) - 1]
        upper = stop + (rank == holders[-1])  # what begins after the last token counts as here
        count = len(starts) - 1
        if first == stop and rank != holders[-1]:
            begins = range(0)
        else:
            begins = range(min(bisect_left(starts, first), count), min(bisect_left(starts, upper), count))
        before = begins.start if begins else min(bisect_left(starts, first), count)
        continued = before > 0 and starts[before - 1] < first < starts[before] and total > 0
        head = min(starts[before], stop) - first if continued else 0
        last = begins.stop - 1 if begins else before - 1  # the sequence of the last token here
        unfinished = (continued or bool(begins)) and starts[last + 1] > stop
        finished = range(before - 1 if continued else before, last + (not unfinished))
        bounds = [min(starts[n], stop) - first - head for n in begins] + [stop - first - head]
        return Shard(1, continued, unfinished, head, begins, finished, tuple(bounds) if begins else (0,))


def even_lengths(total: int, size: int) -> list[int]:
    """``total`` tokens on ``size`` ranks, the first ones having one more where it does not divide."""
    return [total // size + (rank < total % size) for rank in range(size)]
