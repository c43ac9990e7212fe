"""Gradients of the rows and of the decay, of all chunks at once, one program a chunk, value head and tile of channels.
The kernel here is told nothing of the GPU; Hopper's (``kernels/hopper/rows_pull.py``) takes its place where it serves.

With S the state at a chunk's entry and E the gradient of the one at its exit, D the decay between two tokens,

    da = e^r (dU S^T) + (d_gram D) b + (d_lone_gram D) l            dq = scale (e^c (dO S^T) + (d_scores D) b + …)
    db = e^{c_C - c} (X E^T) + (d_gram D)^T a + (d_scores D)^T q    dl likewise, with u for X

Every factor of a pair depends on c_t - c_s alone, so the decay sums get reader times its gradient less writer times
its gradient (``slope``), and e^{c_C} what reaches the exit state; a token's log-decay gets the sum of those from it on.
(Raw reads: from the next token on.) Both sides of a pair must cancel for the tokens before it: where a channel has a
decay of its own, the slopes are formed of the very operands, rounded, that the products took.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from parallelflow.kernels.chunks import Chunks
from parallelflow.kernels.launch import bind
from parallelflow.kernels.products import float32_precision, shared_memory
from parallelflow.kernels.rows.layout import (
    MOST_CHUNKS,
    NARROW,
    NO_DECAY,
    VECTOR_DECAY,
    Factor,
    Layout,
    heads_of,
    width_of,
)
from parallelflow.kernels.rows.pairs import Pairs
from parallelflow.kernels.rows.prepare import of_factor, sizes
from parallelflow.kernels.rows.pull_kernel import pull_kernel
from parallelflow.kernels.rows.pull_strong import pull_strong_kernel
from parallelflow.kernels.rows.sums import summed, zeros

PROGRAMS = 4096  # enough for any device: most chunks need nothing of what they are for


class Tier(NamedTuple):
    """What launches the kernel, for how many channels at a time (of more than 16 bits or not), and whether it forms the
    gradients of the Gram matrices (``pairs.py``) itself."""

    launch: Callable[..., None]
    width: Callable[[Layout, bool], int]
    forms_pairs: bool


class Pulled(NamedTuple):
    """Once a value head: ``query [B, T, 1, HV, K]``, ``read, write [B, T, R, HV, K]``, ``lone [B, T, L, HV, K]``, in
    float32 where value heads are still to be summed, else in the inputs' dtype; ``log_decay [B, T, HV(, K)]`` in
    float32. ``read`` is that of the read with its coefficient; if reads and writes are tied, ``write`` has all of the
    vector's, and ``read_coefficient [B, T, R, HV]`` the coefficient's, in float32."""

    query: Tensor
    read: Tensor | None
    read_coefficient: Tensor | None
    write: Tensor | None
    lone: Tensor | None
    log_decay: Tensor | None


@lru_cache(maxsize=16)
def triangle(device: torch.device) -> Tensor:
    """Ones on and below the diagonal."""
    return torch.ones(64, 64, dtype=torch.bfloat16, device=device).tril()


def launch(count: int, arrays: tuple, layout: Layout, chunks: Chunks, constants: dict, tokens: int,
           scale: float) -> None:  # fmt: skip
    """The portable kernel on ``count`` chunks and value heads."""
    query = arrays[0]
    full = query.element_size() > 2
    # Two warps take no descriptors: of narrow tiles ptxas 12.8 gets those wrong (docs/performance/rows.md).
    narrow = min(layout.K, layout.V) <= 32
    options = {"BV": width_of(layout.V, 32), "num_warps": 2 if narrow else 4}
    # Where shared memory is short, tiles do not wait in it.
    options["num_stages"] = 1 if full or shared_memory(query.device) < 160_000 else 3
    if layout.decay == VECTOR_DECAY and not full and not narrow and layout.R + layout.L == 1:
        options["maxnreg"] = 168  # three programs on a multiprocessor; with two rows a token too much would be spilled
    width = channels(layout, full)
    tiles = triton.cdiv(layout.K, width)
    bound = bind(pull_kernel, **constants, **options, BK=width, TILES=tiles, BO=width_of(layout.V, 128))
    bound(count * tiles, *arrays, tokens, scale, triangle(query.device))


def channels(layout: Layout, full: bool) -> int:
    """Channels of the keys in a program."""
    return width_of(layout.K, 64 if layout.decay == NO_DECAY and not full else 32)


PORTABLE = Tier(launch, channels, False)


def pull(query: Tensor, read: Factor | None, write: Tensor | None, lone_write: Tensor | None,
         log_decay: Tensor | None, solution: Tensor | None, given: Tensor | None, d_source: Tensor | None,
         d_output: Tensor, entry_states: Tensor, exit_gradients: Tensor, total: Tensor | None,
         floors: Tensor | None, pairs: Pairs, layout: Layout, chunks: Chunks, scale: float,
         tier: Tier) -> Pulled:  # fmt: skip
    """The gradients above, for contiguous arrays."""
    batch, time = query.shape[:2]
    heads, R, L = layout.value_heads, layout.R, layout.L
    strong = layout.decay == VECTOR_DECAY  # may be: what a chunk needs is known on the device alone
    width = tier.width(layout, query.element_size() > 2)
    tiles, narrow_tiles = triton.cdiv(layout.K, width), triton.cdiv(layout.K, NARROW)

    def vacant(rows: int, own: int) -> Tensor:
        dtype = query.dtype if own == heads else torch.float32
        return query.new_empty(batch, time, rows, heads, layout.K, dtype=dtype)

    tied = read is not None and read.vector is write and read.kind == 1
    d_query, d_read, d_read_coefficient, d_write, d_lone = vacant(1, layout.heads), None, None, None, None
    if read is not None and write is not None:
        d_write = vacant(R, write.shape[-2])
        if tied:
            d_read_coefficient = zeros(query, narrow_tiles if strong else tiles, batch, time, R, heads)
        else:
            d_read = vacant(R, heads if read.kind == 0 and read.sign == 1 and read.heads == heads else 0)
    if lone_write is not None:
        d_lone = vacant(L, lone_write.shape[-2])
    d_log_decay = None
    if layout.decay != NO_DECAY:
        shape = (1, batch, time, heads, layout.K) if layout.decay == VECTOR_DECAY else (tiles, batch, time, heads)
        d_log_decay = query.new_empty(shape, dtype=torch.float32)
    count = chunks.count * heads
    vector, coefficient = (None, None) if read is None else (read.vector, read.coefficient)
    arrays = (query, vector, coefficient, write, lone_write, log_decay, solution, given, d_source, d_output,
              entry_states, exit_gradients, total, floors, *pairs, d_query, d_read, d_read_coefficient, d_write, d_lone,
              d_log_decay, chunks.table, chunks.time, chunks.per_sequence)  # fmt: skip
    constants = {
        **sizes(layout), "LEVELS": layout.levels, "H": layout.heads, "HV": heads, "K": layout.K, "V": layout.V,
        "DECAY": layout.decay, "RAW": layout.raw, "SEQUENTIAL": layout.sequential, **of_factor("READ", read),
        "WRITE_HEADS": heads_of(write), "LONE_HEADS": heads_of(lone_write), "GIVEN_HEADS": heads_of(given),
        "TIED": tied, "PACKED": chunks.packed, "PRECISION": float32_precision(query.device),
    }  # fmt: skip
    if count:
        tier.launch(count, arrays, layout, chunks, constants, batch * time, scale)
    if count and strong:
        bound = bind(pull_strong_kernel, **constants, BK=NARROW, TILES=narrow_tiles, BV=width_of(layout.V, 32),
                     num_warps=4, num_stages=1)  # fmt: skip
        share = min(max(count * narrow_tiles // PROGRAMS, 1), MOST_CHUNKS)
        bound(triton.cdiv(count, share) * narrow_tiles, *arrays, batch * time, scale, count, share)
    if d_read_coefficient is not None:
        d_read_coefficient = summed(d_read_coefficient, 0, torch.float32)
    if d_log_decay is not None:
        d_log_decay = d_log_decay[0] if layout.decay == VECTOR_DECAY else summed(d_log_decay, 0, torch.float32)
    return Pulled(d_query, d_read, d_read_coefficient, d_write, d_lone, d_log_decay)
