"""Which chunks follow one another: runs of a flat chunk axis, one run a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Lanes:
    """Consecutive runs on a flat axis of chunks: lane ``i`` is ``lengths[i]`` chunks that follow one another in time.

    A regular batch of B sequences is B lanes of equal length, packed sequences are lanes of their own lengths, and a
    lane cut in parts is simply more lanes. Every lane has at least one chunk.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        starts, total = [], 0
        for length in self.lengths:
            starts.append(total)
            total += length
        return tuple(starts)

    @property
    def chunks(self) -> int:
        return sum(self.lengths)

    @cached_property
    def equal(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    @cached_property
    def order(self) -> list[int]:
        """The lanes, longest first: those still active at a step are then a prefix."""
        return sorted(range(len(self.lengths)), key=lambda lane: -self.lengths[lane])

    def active(self, step: int) -> int:
        """How many lanes have a chunk at ``step``."""
        return sum(length > step for length in self.lengths)

    def select(self, step: int, device: torch.device, reverse: bool = False) -> slice | Tensor:
        """Index of the chunks at ``step`` (from the end when ``reverse``) in lane ``order``: a slice when it can be."""
        if self.equal:
            length = self.lengths[0]
            return slice(length - 1 - step if reverse else step, None, length)
        lanes = self.order[: self.active(step)]
        offset = [self.starts[lane] + (self.lengths[lane] - 1 - step if reverse else step) for lane in lanes]
        return torch.tensor(offset, dtype=torch.long, device=device)

    def sort(self, states: Tensor) -> Tensor:
        """Per-lane rows brought into lane ``order``."""
        return states if self.equal else states[torch.tensor(self.order, device=states.device)]

    def unsort(self, states: Tensor) -> Tensor:
        """The inverse of ``sort``."""
        return states if self.equal else states[torch.tensor(self.order, device=states.device).argsort()]

    def gather(self, steps: list[Tensor], reverse: bool = False) -> Tensor:
        """What was found step by step, put back on the chunk axis."""
        if reverse and self.equal:
            steps = steps[::-1]
        if self.equal:
            return steps[0] if len(steps) == 1 else torch.stack(steps, 1).flatten(0, 1)
        device = steps[0].device
        places = torch.cat([self.select(step, device, reverse) for step in range(len(steps))])  # type: ignore[misc]
        return torch.cat(steps)[places.argsort()]

    def cut(self, parts: int) -> tuple[Lanes, Lanes]:
        """Each lane in at most ``parts`` nearly equal runs: the lanes of chunks, and the lanes of the runs."""
        runs: list[int] = []
        counts: list[int] = []
        for length in self.lengths:
            count = min(parts, length)
            runs += [length * (part + 1) // count - length * part // count for part in range(count)]
            counts.append(count)
        return Lanes(runs), Lanes(counts)

    def reversal(self, device: torch.device) -> Tensor:
        """Each lane's chunks from last to first: an index that is its own inverse."""
        places = [
            start + length - 1 - place
            for start, length in zip(self.starts, self.lengths, strict=True)
            for place in range(length)
        ]
        return torch.tensor(places, dtype=torch.long, device=device)

    # Neighbours in pairs, for a scan in log depth.

    def pairs(self) -> tuple[list[int], list[int], list[int]]:
        """Places of each pair's first and second chunk, and of the last chunks that stay alone."""
        first, second, alone = [], [], []
        for start, length in zip(self.starts, self.lengths, strict=True):
            first += range(start, start + length - 1, 2)
            second += range(start + 1, start + length, 2)
            if length % 2:
                alone.append(start + length - 1)
        return first, second, alone

    def heads(self) -> list[int]:
        """Places of the chunks that start a pair or stay alone."""
        return [
            start + place
            for start, length in zip(self.starts, self.lengths, strict=True)
            for place in range(0, length, 2)
        ]

    def has_partner(self) -> list[bool]:
        """For each of ``heads``, whether a second chunk follows it in its pair."""
        return [place + 1 < length for length in self.lengths for place in range(0, length, 2)]

    def halve(self) -> tuple[Lanes, list[int]]:
        """The lanes of pairs, and how ``(all pairs, then all left alone)`` is ordered on their axis."""
        paired = self.has_partner()
        count, pair, single, order = sum(paired), 0, 0, []
        for partner in paired:
            if partner:
                order.append(pair)
                pair += 1
            else:
                order.append(count + single)
                single += 1
        return Lanes([(length + 1) // 2 for length in self.lengths]), order
