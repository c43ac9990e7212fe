"""What every chunk needs before the scans, for all chunks at once.

With a, b, q the chunk's read, write and query rows, l the rows that only write, c the decay sums of docs/theory.md:

    reads    a_p e^{r_p}       queries  scale q_t e^{c_t}       writes  b_q e^{c_C - c_q}       lone  l_q e^{c_C - c_q}
    gram     G[p, q] = 1(q precedes p) (a_p · b_q) e^{r_p - c_q},      lone_gram the same with l
    scores   Cq[t, q] = 1(t(q) <= t) scale (q_t · b_q) e^{c_t - c_q},  lone_scores the same with l
    inverse  (I - G)^-1                                        total    e^{c_C}

``gram`` is kept in float32 until it is inverted; everything else is rounded once, to the inputs' dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallelflow.kernels.chunks import Chunks
from parallelflow.kernels.launch import bind
from parallelflow.kernels.prepare import assemble, corner, invert_base, store_block
from parallelflow.kernels.products import float32_precision
from parallelflow.kernels.rows.gram import WHOLE_CHUNK, gram_kernel
from parallelflow.kernels.rows.layout import (
    NARROW,
    NO_DECAY,
    VECTOR_DECAY,
    WHOLE,
    Factor,
    Layout,
    centred,
    heads_of,
    width_of,
)


class Prepared(NamedTuple):
    """``reads, writes [B, T, R, HV, K]``, ``queries [B, T, 1, HV, K]``, ``lone [B, T, L, HV, K]``; of each chunk and
    value head ``inverse [N, N]``, ``scores [Q, N]``, ``lone_gram [N, M]``, ``lone_scores [Q, M]``; ``total``: None
    without decay, else ``[chunks, HV]`` or ``[chunks, HV, K]`` in float32; ``floors`` ``[chunks, HV]`` in int32
    where channels have decays of their own (factors.py). What a driver lacks is None."""

    queries: Tensor
    reads: Tensor | None
    writes: Tensor | None
    lone: Tensor | None
    inverse: Tensor | None
    scores: Tensor | None
    lone_gram: Tensor | None
    lone_scores: Tensor | None
    total: Tensor | None
    floors: Tensor | None


@triton.jit
def inverse_kernel(gram, inverse, floors, N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
                   STRONG: tl.constexpr):  # fmt: skip
    """(I - G)^-1 of one chunk and value head: inverses of 16 x 16 blocks, merged by pairs. STRONG: unless the chunk
    may be centred as a whole."""
    flat = tl.program_id(0).to(tl.int64)
    if STRONG:  # noqa: SIM102 - settled while compiling
        if tl.load(floors + flat) == WHOLE_CHUNK:
            return
    gram += flat * N * N
    inverse += flat * N * N
    i = tl.arange(0, 16)
    base = tl.arange(0, N // 16)[:, None, None] * 16
    x = invert_base(-tl.load(gram + (base + i[None, :, None]) * N + base + i[None, None, :]), SPLIT, PRECISION)
    if N == 64:
        pair = tl.arange(0, 2)[:, None, None] * 32
        blocks = -tl.load(gram + (pair + 16 + i[None, :, None]) * N + pair + i[None, None, :])
        upper, lower = tl.split(tl.permute(tl.reshape(x, [2, 2, 16, 16]), (0, 2, 3, 1)))
        x = assemble(upper, lower, corner(upper, lower, blocks, SPLIT, PRECISION))
    if N > 16:
        half: tl.constexpr = N // 2
        j = tl.arange(0, half)
        blocks = -tl.load(gram + (j[:, None] + half) * N + j[None, :])
        upper, lower = tl.split(tl.permute(x, (1, 2, 0)))
        store_block(inverse, upper, 0, 0, N)
        store_block(inverse, tl.zeros_like(upper), 0, half, N)
        store_block(inverse, lower, half, half, N)
        store_block(inverse, corner(upper, lower, blocks, SPLIT, PRECISION), half, 0, N)
    else:
        store_block(inverse, tl.reshape(x, [16, 16]), 0, 0, N)


def of_factor(name: str, factor: Factor | None) -> dict[str, int]:
    """What a kernel is compiled for, of one factor with a coefficient."""
    heads, kind, own, sign = (1, 0, 1, 1) if factor is None else (
        factor.heads, factor.kind, factor.coefficient_heads, factor.sign)  # fmt: skip
    return {f"{name}_HEADS": heads, f"{name}_KIND": kind, f"{name}_COEFFICIENT_HEADS": own, f"{name}_SIGN": sign}


def sizes(layout: Layout) -> dict[str, int]:
    """What every stage is compiled for."""
    return {name: getattr(layout, name) for name in ("C", "R", "L", "N", "M", "Q")}


Whole = Callable[..., None]  # all of it, but for chunks with strong decays: Hopper's launch


def prepare(query: Tensor, read: Factor | None, write: Tensor | None, lone_write: Tensor | None,
            log_decay: Tensor | None, layout: Layout, chunks: Chunks, scale: float,
            whole: Whole | None = None) -> Prepared:  # fmt: skip
    """The arrays above, for contiguous inputs, by the kernels here or, if ``whole``, by that and for strong decays by
    these. Without decay the writes are the input."""
    batch, time = query.shape[:2]
    rows, pairs, heads = (batch, time), chunks.count * layout.value_heads, layout.value_heads
    R, L, N, M, Q = layout.R, layout.L, layout.N, layout.M, layout.Q

    def vacant(*shape: int, there: bool = True, dtype: torch.dtype = query.dtype) -> Tensor | None:
        return query.new_empty(shape, dtype=dtype) if there else None

    channels = (layout.K,) if layout.decay == VECTOR_DECAY else ()
    found = Prepared(
        queries=query.new_empty(*rows, 1, heads, layout.K),
        reads=vacant(*rows, R, heads, layout.K, there=R > 0),
        writes=write if writes_are_given(layout, write) else vacant(*rows, R, heads, layout.K, there=R > 0),
        lone=vacant(*rows, L, heads, layout.K, there=L > 0),
        inverse=vacant(pairs, N, N, there=R > 0), scores=vacant(pairs, Q, N, there=R > 0),
        lone_gram=vacant(pairs, N, M, there=R > 0 and L > 0), lone_scores=vacant(pairs, Q, M, there=L > 0),
        total=vacant(pairs, *channels, there=layout.decay != NO_DECAY, dtype=torch.float32),
        floors=vacant(pairs, there=layout.decay == VECTOR_DECAY, dtype=torch.int32),
    )  # fmt: skip
    floors = layout.floors if whole is None else layout.floors[1:]
    if pairs and whole is not None:
        whole(query, read, write, lone_write, log_decay, found, layout, chunks, scale)
    if pairs and floors:
        _prepare_here(query, read, write, lone_write, log_decay, found, floors, layout, chunks, scale)
    return found


def writes_are_given(layout: Layout, write: Tensor | None) -> bool:
    """Whether what is written needs no array of its own."""
    return layout.decay == NO_DECAY and write is not None and heads_of(write) == layout.value_heads


def _prepare_here(query: Tensor, read: Factor | None, write: Tensor | None, lone_write: Tensor | None,
                  log_decay: Tensor | None, found: Prepared, floors: tuple[int, ...], layout: Layout, chunks: Chunks,
                  scale: float) -> None:  # fmt: skip
    """By the kernels here, for chunks that need one of ``floors``."""
    pairs, heads, N = chunks.count * layout.value_heads, layout.value_heads, layout.N
    precision, full = float32_precision(query.device), query.element_size() > 2
    width = width_of(layout.K, 32 if full else 64)
    gram = query.new_empty(pairs, N, N, dtype=torch.float32) if layout.R else None
    vector, coefficient = (None, None) if read is None else (read.vector, read.coefficient)
    for floor in floors:
        launch = bind(
            gram_kernel, **sizes(layout), LEVELS=layout.levels, H=layout.heads, HV=heads, K=layout.K,
            BK=width if floor == WHOLE else NARROW, DECAY=layout.decay, FLOOR=floor, CENTRED=centred(query.dtype),
            RAW=layout.raw, SEQUENTIAL=layout.sequential, **of_factor("READ", read), WRITE_HEADS=heads_of(write),
            LONE_HEADS=heads_of(lone_write), COPY=not writes_are_given(layout, write), PACKED=chunks.packed,
            PRECISION=precision, num_warps=4, num_stages=1)  # fmt: skip
        launch(pairs, query, vector, coefficient, write, lone_write, log_decay, found.queries,
               found.reads, found.writes, found.lone, gram, found.scores, found.lone_gram, found.lone_scores,
               found.total, found.floors, chunks.table, chunks.time, chunks.per_sequence, scale)  # fmt: skip
    if gram is not None:
        launch = bind(inverse_kernel, N=N, SPLIT=not full, PRECISION=precision, STRONG=WHOLE not in floors, num_warps=1,
                      num_stages=1)  # fmt: skip
        launch(pairs, gram, found.inverse, found.floors)
