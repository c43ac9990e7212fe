"""Where the chunks of a batch lie.

A flat index `m` counts the chunks of all sequences.  In a regular batch of `B` sequences of `T` tokens it is
`m = b * ceil(T / C) + i`; packed sequences carry tables.  Nothing here reads a device tensor on the host.

A window of a regular batch is some whole chunks of each sequence, the same ones, or the last ones.  Its tensors begin
with the window's first token and chunk; from one sequence to the next they go on by whole sequences.  Arrays made for
the window alone count its own chunks.  Without a window, or packed, own chunks are chunks.
"""

from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Chunks(NamedTuple):
    """The chunks of a batch.

    size: tokens in a chunk (C).  count: number of own chunks (M).  sequences: number of sequences (N).
    time: tokens from one sequence to the next, of all sequences when packed (T).  length: tokens of a sequence in the
    window (T without one, and when packed).  per_sequence: ceil(T / C), unused when packed.
    table: int32 [M, 2], first token and number of tokens of each chunk (0 for the chunks that are only spare), or None.
    cu_seqlens: int32 [N + 1], first token of each sequence, or None.
    offsets: int32 [N + 1], first chunk of each sequence, or None.
    """

    size: int
    count: int  # type: ignore[assignment]
    sequences: int
    time: int
    length: int
    per_sequence: int
    table: Tensor | None
    cu_seqlens: Tensor | None
    offsets: Tensor | None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None


@lru_cache(maxsize=4096)
def regular_chunks(batch: int, time: int, size: int, length: int | None = None) -> Chunks:
    """The chunks of `batch` sequences of `time` tokens each, or of a window of `length` tokens of each."""
    length = time if length is None else length
    own = batch * triton.cdiv(length, size)
    return Chunks(size, own, batch, time, length, triton.cdiv(time, size), None, None, None)


def packed_chunks(cu_seqlens: Tensor, time: int, size: int, cu_seqlens_host: Tensor | None = None) -> Chunks:
    """The chunks of sequences packed along time, from `cu_seqlens` [N + 1] on the device.

    With a host copy the number of chunks is exact; without it, it is the bound `T // C + N`, known without waiting
    for the device, and the spare chunks are empty.
    """
    sequences = cu_seqlens.numel() - 1
    cu_seqlens = cu_seqlens.to(torch.int32)
    zero = cu_seqlens.new_zeros(1)
    counts = (cu_seqlens.diff() + size - 1) // size
    offsets = torch.cat([zero, counts.cumsum(0, dtype=torch.int32)])
    if cu_seqlens_host is None:
        count = time // size + sequences
    else:
        count = int(((cu_seqlens_host.diff() + size - 1) // size).sum())
    flat = torch.arange(count, device=cu_seqlens.device, dtype=torch.int32)
    owner = torch.searchsorted(offsets, flat, right=True).sub(1).clamp(max=sequences - 1)
    first = cu_seqlens[owner] + (flat - offsets[owner]) * size
    length = (cu_seqlens[owner + 1] - first).clamp(0, size)
    table = torch.stack([first, length], dim=1).to(torch.int32).contiguous()
    return Chunks(size, count, sequences, time, time, 0, table, cu_seqlens, offsets)


def to_device(tables: list[list[int]], device: torch.device) -> list[Tensor]:
    """int32 tables, in one copy that the host does not wait for, each at an address that launches are bound for."""
    padded = [len(table) + -len(table) % 4 for table in tables]
    numbers = chain.from_iterable([*table, *[0] * (-len(table) % 4)] for table in tables)
    together = _moved(torch.tensor(list(numbers), dtype=torch.int32, device="cpu"), device)
    parts = together.split(padded)
    return [part[: len(table)] for part, table in zip(parts, tables, strict=True)]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    if torch.cuda.is_current_stream_capturing():  # the copy would be part of the graph, and its source gone by then
        raise RuntimeError(
            "parallelflow: got new lengths while a CUDA graph is captured, expected one call with them before"
        )
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def known_chunks(starts: tuple[int, ...], size: int, device: torch.device) -> Chunks:
    """The chunks of packed sequences whose boundaries are known on the host: one table, one copy to the device, and the
    same tensors for all layers of a step, forward and backward."""
    counts = [-(-(last - first) // size) for first, last in pairwise(starts)]
    offsets = [0, *accumulate(counts)]
    rows = [
        (token, min(size, last - token))
        for (first, last) in pairwise(starts)
        for token in range(first, last, size)
    ]  # fmt: skip
    edges, after, table = to_device([[*starts], offsets, [*chain.from_iterable(rows)]], device)
    return Chunks(size, len(rows), len(counts), starts[-1], starts[-1], 0, table.view(-1, 2), edges, after)


@triton.jit
def locate_chunk(chunk, table, time, per_sequence, C: tl.constexpr, PACKED: tl.constexpr):
    """First token (int64, counted from the start of the batch) and number of tokens of a chunk."""
    if PACKED:
        first = tl.load(table + 2 * chunk).to(tl.int64)
        length = tl.load(table + 2 * chunk + 1)
    else:
        sequence = chunk // per_sequence
        step = (chunk - sequence * per_sequence) * C
        first = sequence.to(tl.int64) * time + step
        length = tl.minimum(time - step, C)
    return first, length


@triton.jit
def locate_sequence(sequence, cu_seqlens, offsets, time, per_sequence, PACKED: tl.constexpr):
    """First token (int64), number of tokens and first chunk of a sequence."""
    if PACKED:
        start = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - start
        first = start.to(tl.int64)
        chunk = tl.load(offsets + sequence)
    else:
        first = sequence.to(tl.int64) * time
        length = time
        chunk = sequence * per_sequence
    return first, length, chunk


@triton.jit
def locate_own_chunk(own, table, time, tokens, per_sequence, C: tl.constexpr, PACKED: tl.constexpr):
    """First token (int64) and number of tokens of an own chunk of a window of `tokens`; its number among all chunks."""
    if PACKED:
        first, length = locate_chunk(own, table, time, per_sequence, C, PACKED)
        chunk = own.to(tl.int64)
    else:
        count = tl.cdiv(tokens, C)
        sequence = (own // count).to(tl.int64)
        step = own - sequence * count
        first = sequence * time + step * C
        length = tl.minimum(tokens - step * C, C)
        chunk = sequence * per_sequence + step
    return first, length, chunk


@triton.jit
def locate_window(sequence, cu_seqlens, offsets, time, tokens, per_sequence, C: tl.constexpr, PACKED: tl.constexpr):
    """First token (int64), number of tokens, first chunk and first own chunk of a sequence in a window of `tokens`."""
    first, length, chunk = locate_sequence(sequence, cu_seqlens, offsets, time, per_sequence, PACKED)
    own = chunk
    if not PACKED:
        length = tokens
        own = sequence * tl.cdiv(tokens, C)
    return first, length, chunk, own
