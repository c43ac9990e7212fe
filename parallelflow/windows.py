"""Cutting time: into windows that bound the memory of one pass, and those into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallelflow.lanes import Lanes


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` of the line: pieces of sequences, each cut into chunks from its own start.

    Of a regular batch a window holds the same tokens of all ``batch`` sequences. Of packed sequences (batch 1) it holds
    ``pieces`` one after another: the first may ``continue`` a sequence of the window before, the last may be
    ``unfinished``. ``begins`` and ``ends`` number the sequences whose first and last tokens are here.
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

    @cached_property
    def _aligned(self) -> bool:
        return len(self.pieces) == 1

    def _places(self, device: torch.device) -> Tensor:
        """Where each token of the window stands on the axis of padded chunks."""
        places, chunk = [], 0
        for piece in self.pieces:
            places.append(torch.arange(piece, device=device) + chunk * self.chunk_size)
            chunk += -(-piece // self.chunk_size)
        return torch.cat(places)

    def cut(self, line: Tensor) -> Tensor:
        """``[B, T, …] -> [M, C, …]``: this window's tokens in chunks, the ends of pieces filled with zeros."""
        tokens = line[:, self.start : self.stop]
        if self._aligned:
            missing = -tokens.shape[1] % self.chunk_size
            if missing:
                tokens = pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, missing))
            return tokens.unflatten(1, (-1, self.chunk_size)).flatten(0, 1)
        shape = (self.lanes.chunks * self.chunk_size, *tokens.shape[2:])
        padded = tokens.new_zeros(shape).index_copy(0, self._places(tokens.device), tokens[0])
        return padded.unflatten(0, (-1, self.chunk_size))

    def join(self, chunks: Tensor) -> Tensor:
        """``[M, C, …] -> [B, stop - start, …]``, the transpose of ``cut``."""
        if self._aligned:
            return chunks.unflatten(0, (self.batch, -1)).flatten(1, 2)[:, : self.stop - self.start]
        return chunks.flatten(0, 1)[self._places(chunks.device)].unsqueeze(0)


def plan_windows(
    batch: int, time: int, sequence_starts: Sequence[int] | None, chunk_size: int, window_tokens: int
) -> list[Window]:
    """Windows of at most ``window_tokens`` (a multiple of the chunk) that cover the line.

    Long sequences are cut at multiples of ``window_tokens`` from their own start, so that a sequence is computed in the
    same pieces whatever is packed around it; short ones share a window.
    """
    if sequence_starts is None:
        windows = []
        for start in range(0, time, window_tokens):
            stop = min(start + window_tokens, time)
            first, last = start == 0, stop == time
            everyone = tuple(range(batch))
            windows.append(
                Window(
                    start, stop, (stop - start,), batch, chunk_size,
                    not first, not last, everyone if first else (), everyone if last else (),
                )
            )  # fmt: skip
        return windows

    windows = []
    pieces: list[int] = []
    begins: list[int] = []
    ends: list[int] = []
    start = stop = 0
    continued = False

    def close(unfinished: bool) -> None:
        nonlocal start, pieces, begins, ends, continued
        if pieces:
            windows.append(
                Window(
                    start, stop, tuple(pieces), 1, chunk_size, continued, unfinished, tuple(begins), tuple(ends)
                )
            )  # fmt: skip
        start, pieces, begins, ends, continued = stop, [], [], [], unfinished

    for sequence, (first, last) in enumerate(zip(sequence_starts, sequence_starts[1:], strict=False)):
        if first == last:
            continue
        if pieces and stop - start + (last - first) > window_tokens:
            close(False)
        begins.append(sequence)
        while last - first > window_tokens:
            pieces.append(window_tokens)
            first += window_tokens
            stop = first
            close(True)
        pieces.append(last - first)
        stop = last
        ends.append(sequence)
    close(False)
    return windows
