"""Which chunks follow one another: several sequences of chunks on one flat axis, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Lanes:
    """Sequences of chunks that advance together: lane ``i`` has ``lengths[i] ≥ 1`` chunks.

    Their chunks lie on one axis, step after step: first the first chunks of all lanes, then the second ones, and so on,
    the longest lanes first (``order``). The chunks of a step are then one slice, for a regular batch (lanes of equal
    length) and for packed sequences alike.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def order(self) -> list[int]:
        """The lanes as they lie in a step: longest first, else as given."""
        return sorted(range(len(self.lengths)), key=lambda lane: -self.lengths[lane])

    @cached_property
    def active(self) -> list[int]:
        """How many lanes have a chunk at each step."""
        counts = [0] * max(self.lengths)
        for length in self.lengths:
            counts[length - 1] += 1
        for step in range(len(counts) - 1, 0, -1):
            counts[step - 1] += counts[step]
        return counts

    @cached_property
    def offsets(self) -> list[int]:
        """Where each step begins on the axis of chunks, and where the last one ends."""
        offsets = [0]
        for count in self.active:
            offsets.append(offsets[-1] + count)
        return offsets

    @property
    def steps(self) -> int:
        return len(self.active)

    @property
    def chunks(self) -> int:
        return self.offsets[-1]

    @property
    def regular(self) -> bool:
        """Whether all lanes are equally long."""
        return self.active[0] == self.active[-1]

    def at(self, step: int) -> slice:
        """The chunks of a step."""
        return slice(self.offsets[step], self.offsets[step + 1])

    def sort(self, states: Tensor) -> Tensor:
        """One row a lane, as given, brought into ``order``."""
        return states if self.regular else states[torch.tensor(self.order, device=states.device)]

    def unsort(self, states: Tensor) -> Tensor:
        """The inverse of ``sort``."""
        return states if self.regular else states[torch.tensor(self.order, device=states.device).argsort()]

    def place(self, rank: int, step: int) -> int:
        """The chunk of the lane at ``rank`` in ``order``."""
        return self.offsets[step] + rank

    def reversal(self, device: torch.device) -> Tensor:
        """Each lane's chunks from last to first: an index that is its own inverse."""
        sorted_lengths = [self.lengths[lane] for lane in self.order]
        places = [
            self.place(rank, sorted_lengths[rank] - 1 - step)
            for step, count in enumerate(self.active)
            for rank in range(count)
        ]
        return torch.tensor(places, dtype=torch.long, device=device)

    def cut(self, parts: int, device: torch.device) -> tuple[Lanes, Lanes, Tensor, Tensor]:
        """Each lane in at most ``parts`` runs of nearly equal length.

        Returns the runs as lanes, the lanes of runs, where each chunk of the runs' axis lies on this one, and where
        each run of the lanes of runs lies in the order in which the runs are given.
        """
        runs: list[int] = []
        places: list[list[int]] = []  # of each run's chunks
        counts = [min(parts, self.lengths[lane]) for lane in self.order]
        first: list[int] = []
        for rank, count in enumerate(counts):
            length = self.lengths[self.order[rank]]
            first.append(len(runs))
            for part in range(count):
                begin, end = length * part // count, length * (part + 1) // count
                runs.append(end - begin)
                places.append([self.place(rank, step) for step in range(begin, end)])
        inner, outer = Lanes(runs), Lanes(counts)
        chunks = [places[inner.order[rank]][step] for step, count in enumerate(inner.active) for rank in range(count)]
        numbers = [first[outer.order[rank]] + step for step, count in enumerate(outer.active) for rank in range(count)]
        return (
            inner,
            outer,
            torch.tensor(chunks, dtype=torch.long, device=device),
            torch.tensor(numbers, dtype=torch.long, device=device),
        )

    def halve(self) -> tuple[Lanes, list[int], list[int], list[int]]:
        """Neighbours in pairs: the lanes of pairs, the places of each pair's first and second chunk, and those of the
        last chunks that stay alone. On the axis of pairs a step has its pairs first, then those left alone."""
        first: list[int] = []
        second: list[int] = []
        alone: list[int] = []
        for step in range(0, self.steps, 2):
            paired = self.active[step + 1] if step + 1 < self.steps else 0
            first += range(self.offsets[step], self.offsets[step] + paired)
            second += range(self.offsets[step] + self.active[step], self.offsets[step] + self.active[step] + paired)
            alone += range(self.offsets[step] + paired, self.offsets[step] + self.active[step])
        return Lanes([(length + 1) // 2 for length in self.lengths]), first, second, alone
