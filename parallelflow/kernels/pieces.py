"""The backward pass in pieces of time, so that what it keeps for every chunk is there for one piece only.

The states at the chunks' entries, the gradients of the states at their exits and R are most of what a backward pass
takes, and nobody needs them but the gradients of the same chunks. So a long sequence goes back piece by piece, the
latest first: its states are made again from the one at the piece's entry, which the forward pass stores on its way (the
halts, in float32), the reverse scan goes on from where it stopped, in float32 too, and the gradients of the piece
follow. Every number is the one that a single piece gives, to the bit, so that the cut may depend on anything: on the
batch as well, which no result may depend on.

A batch that more than fills the card goes back a cardful of sequences at a time, the same way.  Packed sequences do so
alone, without pieces: a run of them at a time, where that keeps the card as busy.
"""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from .chunks import Chunks, known_chunks, regular_chunks

LARGEST = 2**28  # bytes of a piece's entry states; their gradients take as many again
SMALL = 2**26  # bytes of all entry states with which one piece is enough
USUAL = 4  # pieces of more than that: a quarter of the states, for three times three launches
FEWEST = 16  # chunks of a piece: the stages' beginnings then take a sixth of the backward's time, with fewer more


class Piece(NamedTuple):
    """A run of whole chunks of each sequence: its tokens and its first chunk (None: all there are), its number in time,
    and how its chunks lie."""

    tokens: slice | None
    first: int | None
    number: int
    layout: Chunks

    def tokens_of(self, tensor: Any) -> Any:
        """Its tokens of ``[B, T, …]`` (None of None)."""
        return tensor if self.tokens is None or tensor is None else tensor[:, self.tokens]

    def chunks_of(self, tensor: Any) -> Any:
        """``[M, …]`` from its first chunk on (None of None)."""
        return tensor if self.first is None or tensor is None else tensor[self.first :]


class Group(NamedTuple):
    """Sequences that go back together and their chunks (None: all there are), how those lie, and the pieces in which
    they go back, in the order of time."""

    sequences: slice | None
    chunks: slice | None
    layout: Chunks
    pieces: list[Piece]

    def states_of(self, tensor: Any) -> Any:
        """Its sequences of ``[N, …]`` (None of None)."""
        return tensor if self.sequences is None or tensor is None else tensor[self.sequences]

    def tokens_of(self, tensor: Any) -> Any:
        """Its sequences of ``[B, T, …]``; of a packed line all of it, of which pieces take their tokens."""
        return tensor if self.layout.packed else self.states_of(tensor)

    def chunks_of(self, tensor: Any) -> Any:
        """Its chunks of ``[M, …]`` (None of None)."""
        return tensor if self.chunks is None or tensor is None else tensor[self.chunks]


def piece_length(steps: int, state_bytes: int) -> int:
    """Chunks in each piece of sequences of ``steps`` chunks whose entry states take ``state_bytes`` in all; ``steps``
    or more: they go back in one."""
    if state_bytes <= SMALL:
        return steps
    pieces = max(USUAL, -(-state_bytes // LARGEST))
    return max(FEWEST, -(-steps // pieces))


def groups_of(chunks: Chunks, chunk_bytes: int, programs: int, processors: int) -> list[Group]:
    """How a regular batch goes back: ``chunk_bytes`` of states a chunk, ``programs`` that carry one sequence."""
    size = min(max(1, processors // programs), chunks.sequences)
    if chunks.count * chunk_bytes <= LARGEST:
        size = chunks.sequences
    length = piece_length(chunks.per_sequence, size * chunks.per_sequence * chunk_bytes)
    if size == chunks.sequences:
        return [Group(None, None, chunks, _pieces(chunks, length))]
    groups = []
    for first in range(0, chunks.sequences, size):
        count = min(size, chunks.sequences - first)
        layout = regular_chunks(count, chunks.time, chunks.size)
        rows = slice(first * chunks.per_sequence, (first + count) * chunks.per_sequence)
        groups.append(Group(slice(first, first + count), rows, layout, _pieces(layout, length)))
    return groups


def packed_groups(starts: tuple[int, ...], size: int, chunk_bytes: int, programs: int, processors: int,
                  device: torch.device) -> list[Group]:  # fmt: skip
    """How a packed line goes back, runs of its sequences one after another: [] where it is to go back whole.

    A run takes a quarter of the chunks, or as many as LARGEST allows.  A scan of a run lasts as long as its longest
    sequence, or as its chunks keep the card; where the runs' scans would last a quarter longer than one scan of all,
    there are none.
    """
    steps = [-(-(last - first) // size) for first, last in pairwise(starts)]
    total = sum(steps)
    if total * chunk_bytes <= SMALL:
        return []
    enough = min(-(-total // USUAL), max(1, LARGEST // chunk_bytes))
    bounds, begun = [0], 0
    for number, end in enumerate(accumulate(steps), 1):
        if end - begun >= enough or (end == total and end > begun):
            bounds.append(number)
            begun = end
    bounds[-1] = len(steps)  # empty sequences at the end

    def duration(run: list[int]) -> float:
        return max(max(run), sum(run) * programs / processors)

    runs = list(pairwise(bounds))
    if len(runs) < 2 or sum(duration(steps[first:last]) for first, last in runs) > 1.25 * duration(steps):
        return []
    chunks_before = [0, *accumulate(steps)]
    groups = []
    for first, last in runs:
        edges = starts[first : last + 1]
        layout = known_chunks(tuple(edge - edges[0] for edge in edges), size, device)
        chunks = slice(chunks_before[first], chunks_before[last])
        piece = Piece(slice(edges[0], edges[-1]), None, 0, layout)
        groups.append(Group(slice(first, last), chunks, layout, [piece]))
    return groups


def whole(layout: Chunks, chunks: Chunks) -> list[Group]:
    """All of a batch in one piece; ``layout`` is that of the scans."""
    return [Group(None, None, layout, [Piece(None, None, 0, chunks)])]


def _pieces(chunks: Chunks, length: int) -> list[Piece]:
    if length >= chunks.per_sequence:
        return [Piece(None, None, 0, chunks)]
    pieces = []
    for number, first in enumerate(range(0, chunks.per_sequence, length)):
        tokens = slice(first * chunks.size, min((first + length) * chunks.size, chunks.time))
        layout = regular_chunks(chunks.sequences, chunks.time, chunks.size, tokens.stop - tokens.start)
        pieces.append(Piece(tokens, first, number, layout))
    return pieces
