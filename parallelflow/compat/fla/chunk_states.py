"""The states in between that FLA returns with ``return_intermediate_states``: the one that each chunk starts from.

``h [B, NT, HV, K, V]`` in the queries' dtype, NT chunks a sequence; packed, ``[1, NT, HV, K, V]`` with the chunks of
all sequences one after another (an empty sequence has none).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class ChunkStarts(NamedTuple):
    """Where chunks begin: ``positions`` counts the tokens before those that are not a sequence's first chunk."""

    positions: list[int]
    first: list[int | None]
    """Of every chunk, the sequence whose first it is, or None."""


def chunk_starts(time: int, cu_seqlens: Tensor | None, chunk_size: int) -> ChunkStarts:
    """Of one sequence of ``time`` tokens, or of packed ones; each sequence is cut from its own first token."""
    positions: list[int] = []
    first: list[int | None] = []
    bounds = [0, time] if cu_seqlens is None else cu_seqlens.tolist()
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        later = range(start + chunk_size, stop, chunk_size)
        positions += later
        first += [sequence] * (stop > start) + [None] * len(later)
    return ChunkStarts(positions, first)


def states_of_chunks(starts: ChunkStarts, entries: Tensor, later: Iterable[Tensor], packed: bool) -> Tensor:
    """The state at the start of every chunk, ``[B, NT, HV, K, V]``.

    ``entries [N, HV, K, V]`` are what sequences start from, ``later`` the states ``[B, HV, K, V]`` after
    ``starts.positions``.
    """
    rest = iter(later)
    found = []
    for sequence in starts.first:
        if sequence is None:
            found.append(next(rest))
        else:
            found.append(entries[sequence : sequence + 1] if packed else entries)
    if not found:  # no tokens
        return entries.new_zeros(1 if packed else entries.shape[0], 0, *entries.shape[1:])
    return torch.stack(found, 1)
