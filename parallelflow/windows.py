"""Cutting time: into windows that bound the memory of one pass, and those into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallelflow.lanes import Lanes


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` of the line: pieces of sequences, each cut into chunks from its own start.

    Of a regular batch a window holds the same tokens of all ``batch`` sequences. Of packed sequences (batch 1) it holds
    ``pieces`` one after another: the first may continue a sequence of the window before (``continued``), the last may
    go on in the next (``unfinished``). ``begins`` and ``ends`` number the sequences whose first and last tokens are
    here.
    """

    start: int
    stop: int
    pieces: tuple[int, ...]
    batch: int
    chunk_size: int
    continued: bool
    unfinished: bool
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @cached_property
    def lanes(self) -> Lanes:
        """The chunks of each piece, for every sequence of the batch."""
        return Lanes([-(-piece // self.chunk_size) for piece in self.pieces] * self.batch)

    def _places(self, device: torch.device) -> Tensor:
        """Where each token of packed pieces stands on the axis of the chunks' tokens."""
        lanes, places = self.lanes, []
        rank = {lane: rank for rank, lane in enumerate(lanes.order)}
        offsets = torch.tensor(lanes.offsets, device=device)
        for lane, piece in enumerate(self.pieces):
            tokens = torch.arange(piece, device=device)
            chunk = offsets[tokens // self.chunk_size] + rank[lane]
            places.append(chunk * self.chunk_size + tokens % self.chunk_size)
        return torch.cat(places)

    def cut(self, line: Tensor) -> Tensor:
        """``[B, T, R, heads, D] -> [M, heads, C·R, D]``: this window's tokens as the rows of its chunks (on the axis of
        ``lanes``), the ends of pieces filled with zeros."""
        tokens = line[:, self.start : self.stop]
        if len(self.pieces) > 1:
            filled = tokens.new_zeros((self.lanes.chunks * self.chunk_size, *tokens.shape[2:]))
            chunks = filled.index_copy(0, self._places(tokens.device), tokens[0]).unflatten(0, (-1, self.chunk_size))
            return chunks.permute(0, 3, 1, 2, 4).flatten(2, 3)
        missing = -tokens.shape[1] % self.chunk_size
        if missing:
            tokens = pad(tokens, (0, 0, 0, 0, 0, 0, 0, missing))
        chunks = tokens.unflatten(1, (-1, self.chunk_size))
        return chunks.permute(1, 0, 4, 2, 3, 5).flatten(3, 4).flatten(0, 1)

    def join(self, rows: Tensor, stacked: bool) -> Tensor:
        """``[M, heads, C·R(, D)] -> [B, stop - start, (R,) heads(, D)]``, the transpose of ``cut``; without its R axis
        (R = 1) if not ``stacked``."""
        chunks = self._by_token(rows, stacked)
        if len(self.pieces) > 1:
            return chunks.flatten(0, 1)[self._places(rows.device)].unsqueeze(0)
        return chunks.unflatten(0, (-1, self.batch)).transpose(0, 1).flatten(1, 2)[:, : self.stop - self.start]

    def put(self, rows: Tensor, line: Tensor) -> None:
        """``join`` written into its place of a line: in one pass, where the window is whole chunks."""
        place, stacked = line[:, self.start : self.stop], line.ndim > rows.ndim
        if len(self.pieces) > 1 or place.shape[1] % self.chunk_size:
            place.copy_(self.join(rows, stacked))
        else:
            chunks = self._by_token(rows, stacked).unflatten(0, (-1, self.batch)).transpose(0, 1)
            place.unflatten(1, (-1, self.chunk_size)).copy_(chunks)

    def _by_token(self, rows: Tensor, stacked: bool) -> Tensor:
        """``[M, heads, C·R(, D)] -> [M, C, (R,) heads(, D)]``, a view."""
        if not stacked:
            return rows.transpose(1, 2)
        return rows.unflatten(2, (self.chunk_size, -1)).movedim(1, 3)


class Assembly:
    """A line put together from its windows, in its own dtype. What no window fills is 0."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.pieces: dict[int, Tensor] = {}
        self.filled = 0

    def put(self, window: Window, rows: Tensor) -> None:
        """A window's rows ``[M, heads, C·R(, D)]``."""
        self.filled += window.stop - window.start
        if torch.is_grad_enabled():
            self.pieces[window.start] = window.join(rows, self.like.ndim > rows.ndim).to(self.like.dtype)
        else:
            window.put(rows, self.like)

    def whole(self) -> Tensor:
        """The line."""
        if self.pieces:
            return torch.cat([self.pieces[start] for start in sorted(self.pieces)], 1)
        return self.like if self.filled else self.like.zero_()


def plan_windows(
    batch: int, time: int, sequence_starts: Sequence[int] | None, chunk_size: int, window_tokens: int
) -> list[Window]:
    """Windows of at most ``window_tokens`` (a multiple of the chunk) that cover the line.

    Long sequences are cut at multiples of ``window_tokens`` from their own start, so that a sequence is computed in the
    same pieces whatever is packed around it; short ones share a window.
    """
    if sequence_starts is None:
        everyone, windows = tuple(range(batch)), []
        for start in range(0, time, window_tokens):
            stop = min(start + window_tokens, time)
            begins, ends = everyone if start == 0 else (), everyone if stop == time else ()
            pieces = (stop - start,)
            windows.append(Window(start, stop, pieces, batch, chunk_size, not begins, not ends, begins, ends))
        return windows

    windows = []
    pieces_here: list[int] = []
    begins_here: list[int] = []
    ends_here: list[int] = []
    start = stop = 0
    continued = False

    def close(unfinished: bool) -> None:
        nonlocal start, continued
        if pieces_here:
            parts = (tuple(pieces_here), 1, chunk_size, continued, unfinished, tuple(begins_here), tuple(ends_here))
            windows.append(Window(start, stop, *parts))
        for numbers in (pieces_here, begins_here, ends_here):
            numbers.clear()
        start, continued = stop, unfinished

    for sequence, (first, last) in enumerate(pairwise(sequence_starts)):
        if first == last:
            continue
        if pieces_here and stop - start + (last - first) > window_tokens:
            close(False)
        begins_here.append(sequence)
        while last - first > window_tokens:
            pieces_here.append(window_tokens)
            first += window_tokens
            stop = first
            close(True)
        pieces_here.append(last - first)
        stop = last
        ends_here.append(sequence)
    close(False)
    return windows
