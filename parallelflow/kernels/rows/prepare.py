"""What every chunk needs before the scans, for all chunks at once.

With a, b, q the chunk's read, write and query rows, l the rows that only write, c the decay sums of docs/theory.md:

    reads    a_p e^{r_p}       queries  scale q_t e^{c_t}       writes  b_q e^{c_C - c_q}       lone  l_q e^{c_C - c_q}
    gram     G[p, q] = 1(q precedes p) (a_p · b_q) e^{r_p - c_q},      lone_gram the same with l
    scores   Cq[t, q] = 1(t(q) <= t) scale (q_t · b_q) e^{c_t - c_q},  lone_scores the same with l
    inverse  (I - G)^-1                                        total    e^{c_C}

``gram`` is kept in float32 until it is inverted; everything else is rounded once, to the inputs' dtype.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallelflow.kernels.chunks import Chunks, locate_chunk
from parallelflow.kernels.launch import bind
from parallelflow.kernels.prepare import assemble, corner, decay_between, invert_base, store_block
from parallelflow.kernels.products import float32_precision
from parallelflow.kernels.rows.factors import (
    from_boundary,
    halves_of_a_block,
    load_channel_decays,
    load_factor,
    load_rows,
    places,
    store_rows,
    to_boundary,
    to_end,
    token_sums,
)
from parallelflow.kernels.rows.layout import NO_DECAY, VECTOR_DECAY, Factor, Layout, heads_of, width_of


class Prepared(NamedTuple):
    """``reads, writes [B, T, R, HV, K]``, ``queries [B, T, 1, HV, K]``, ``lone [B, T, L, HV, K]``; of each chunk and
    value head ``inverse [N, N]``, ``scores [Q, N]``, ``lone_gram [N, M]``, ``lone_scores [Q, M]``; ``total``: None
    without decay, else ``[chunks, HV]`` or ``[chunks, HV, K]`` in float32. What a driver lacks is None."""

    queries: Tensor
    reads: Tensor | None
    writes: Tensor | None
    lone: Tensor | None
    inverse: Tensor | None
    scores: Tensor | None
    lone_gram: Tensor | None
    lone_scores: Tensor | None
    total: Tensor | None


@triton.jit
def paired(sums, late, early, keep, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """``sums`` and the products of ``late`` and ``early`` rows where ``keep``."""
    found = tl.dot(late.to(DTYPE), tl.trans(early.to(DTYPE)), input_precision=PRECISION)
    return sums + tl.where(keep, found, 0.0)


@triton.jit(do_not_specialize=["time", "per_sequence"])
def gram_kernel(query, read, read_coefficient, write, lone_write, log_decay,
                queries, reads, writes, lone, gram, scores, lone_gram, lone_scores, total,
                table, time, per_sequence, scale,
                C: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
                M: tl.constexpr, Q: tl.constexpr,
                H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr,
                RAW: tl.constexpr, SEQUENTIAL: tl.constexpr, READ_HEADS: tl.constexpr, READ_KIND: tl.constexpr,
                READ_COEFFICIENT_HEADS: tl.constexpr, READ_SIGN: tl.constexpr, WRITE_HEADS: tl.constexpr,
                LONE_HEADS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Readers, writers, Gram matrices and total of one chunk and value head."""
    flat = tl.program_id(0).to(tl.int64)
    chunk = flat // HV
    head = flat % HV
    first, length = locate_chunk(chunk, table, time, per_sequence, C, PACKED)
    DTYPE: tl.constexpr = query.dtype.element_ty
    q_token, q_place = places(Q, 1)
    if R > 0:
        n_token, n_place = places(N, R)
        g = tl.zeros([N, N], tl.float32)
        p = tl.zeros([Q, N], tl.float32)
        same = n_token[:, None] == n_token[None, :]
        after = same & (n_place[:, None] > n_place[None, :])
        own = q_token[:, None] == n_token[None, :]
    if L > 0:
        m_token, m_place = places(M, L)
        p_lone = tl.zeros([Q, M], tl.float32)
        own_lone = q_token[:, None] == m_token[None, :]
        if R > 0:
            g_lone = tl.zeros([N, M], tl.float32)
    if DECAY == 1:
        q_high, q_low, end = token_sums(log_decay, first, length, head, Q, 1, False, HV)
        tl.store(total + flat, tl.exp2(end.to(tl.float32)))
        if R > 0:
            a_high, a_low, _ = token_sums(log_decay, first, length, head, N, R, RAW, HV)
            b_high, b_low, _ = token_sums(log_decay, first, length, head, N, R, False, HV)
        if L > 0:
            l_high, l_low, _ = token_sums(log_decay, first, length, head, M, L, False, HV)
    for start in range(0, K, BK):
        column = start + tl.arange(0, BK)
        q = load_rows(query, first, length, head, column, Q, 1, HV, H, K).to(tl.float32) * scale
        if R > 0:
            a = load_factor(read, read_coefficient, first, length, head, column, N, R, HV, READ_HEADS, READ_KIND,
                            READ_COEFFICIENT_HEADS, READ_SIGN, K)  # fmt: skip
            b = load_rows(write, first, length, head, column, N, R, HV, WRITE_HEADS, K).to(tl.float32)
        if L > 0:
            w = load_rows(lone_write, first, length, head, column, M, L, HV, LONE_HEADS, K).to(tl.float32)
        if DECAY == 2:
            q_decays = load_channel_decays(log_decay, first, length, head, column, 0, Q, 1, HV, K)
            if R > 0:
                a_decays = load_channel_decays(log_decay, first, length, head, column, -1 if RAW else 0, N, R, HV, K)
                b_decays = load_channel_decays(log_decay, first, length, head, column, 1, N, R, HV, K)
            if L > 0:
                w_decays = load_channel_decays(log_decay, first, length, head, column, 1, M, L, HV, K)
            # pairs of one token; then of the halves of blocks of 2, 4, …, C tokens
            if R > 0:
                p = paired(p, q, b, own, PRECISION, DTYPE)
                if SEQUENTIAL:
                    g = paired(g, a, b, after, PRECISION, DTYPE)
            if L > 0:
                p_lone = paired(p_lone, q, w, own_lone, PRECISION, DTYPE)
            for level in tl.static_range(LEVELS):
                q_factor = from_boundary(q_decays, 1 << level, 1, False)
                q_late = q * q_factor
                if R > 0:
                    a_late = a * (q_factor if R == 1 and not RAW else from_boundary(a_decays, 1 << level, R, RAW))
                    b_factor = to_boundary(b_decays, 1 << level, R)
                    b_early = b * b_factor
                    g = paired(g, a_late, b_early, halves_of_a_block(n_token, n_token, 1 << level), PRECISION, DTYPE)
                    p = paired(p, q_late, b_early, halves_of_a_block(q_token, n_token, 1 << level), PRECISION, DTYPE)
                if L > 0:
                    w_early = w * (b_factor if R == L else to_boundary(w_decays, 1 << level, L))
                    asked = halves_of_a_block(q_token, m_token, 1 << level)
                    p_lone = paired(p_lone, q_late, w_early, asked, PRECISION, DTYPE)
                    if R > 0:
                        met = halves_of_a_block(n_token, m_token, 1 << level)
                        g_lone = paired(g_lone, a_late, w_early, met, PRECISION, DTYPE)
        else:
            if R > 0:
                g += tl.dot(a.to(DTYPE), tl.trans(b.to(DTYPE)), input_precision=PRECISION)
                p += tl.dot(q.to(DTYPE), tl.trans(b.to(DTYPE)), input_precision=PRECISION)
            if L > 0:
                p_lone += tl.dot(q.to(DTYPE), tl.trans(w.to(DTYPE)), input_precision=PRECISION)
                if R > 0:
                    g_lone += tl.dot(a.to(DTYPE), tl.trans(w.to(DTYPE)), input_precision=PRECISION)
        # what meets the states
        if DECAY == 1:
            q *= tl.exp2(q_high)[:, None]
            if R > 0:
                a *= tl.exp2(a_high)[:, None]
                b *= to_end(end, b_high, b_low)[:, None]
            if L > 0:
                w *= to_end(end, l_high, l_low)[:, None]
        if DECAY == 2:
            tl.store(total + flat * K + column, tl.exp2(tl.sum(q_decays, 0)), mask=column < K)
            q_factor = from_boundary(q_decays, C, 1, False)
            q *= q_factor
            if R > 0:
                a *= q_factor if R == 1 and not RAW else from_boundary(a_decays, C, R, RAW)
                b_factor = to_boundary(b_decays, C, R)
                b *= b_factor
            if L > 0:
                w *= b_factor if R == L else to_boundary(w_decays, C, L)
        store_rows(queries, q, first, length, head, column, Q, 1, HV, K)
        if R > 0:
            store_rows(reads, a, first, length, head, column, N, R, HV, K)
            store_rows(writes, b, first, length, head, column, N, R, HV, K)
        if L > 0:
            store_rows(lone, w, first, length, head, column, M, L, HV, K)
    if DECAY != 2:
        if R > 0:
            before = n_token[:, None] > n_token[None, :]
            if SEQUENTIAL:
                before = before | after
            since = q_token[:, None] >= n_token[None, :]
            if DECAY == 1:
                g *= decay_between(a_high[:, None], a_low[:, None], b_high[None, :], b_low[None, :], before)
                p *= decay_between(q_high[:, None], q_low[:, None], b_high[None, :], b_low[None, :], since)
            else:
                g = tl.where(before, g, 0.0)
                p = tl.where(since, p, 0.0)
        if L > 0:
            since = q_token[:, None] >= m_token[None, :]
            if DECAY == 1:
                p_lone *= decay_between(q_high[:, None], q_low[:, None], l_high[None, :], l_low[None, :], since)
            else:
                p_lone = tl.where(since, p_lone, 0.0)
            if R > 0:
                before = n_token[:, None] > m_token[None, :]
                if DECAY == 1:
                    g_lone *= decay_between(a_high[:, None], a_low[:, None], l_high[None, :], l_low[None, :], before)
                else:
                    g_lone = tl.where(before, g_lone, 0.0)
    q_row = tl.arange(0, Q)[:, None]
    if R > 0:
        n_row = tl.arange(0, N)
        tl.store(gram + flat * N * N + n_row[:, None] * N + n_row[None, :], g)
        tl.store(scores + flat * Q * N + q_row * N + n_row[None, :], p.to(DTYPE))
    if L > 0:
        m_row = tl.arange(0, M)[None, :]
        tl.store(lone_scores + flat * Q * M + q_row * M + m_row, p_lone.to(DTYPE))
        if R > 0:
            tl.store(lone_gram + flat * N * M + n_row[:, None] * M + m_row, g_lone.to(DTYPE))


@triton.jit
def inverse_kernel(gram, inverse, N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """(I - G)^-1 of one chunk and value head: inverses of 16 x 16 blocks, merged by pairs."""
    flat = tl.program_id(0).to(tl.int64)
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


def widest(K: int, element_size: int, decay: int) -> int:
    """Columns of a tile of rows."""
    most = 16 if decay == VECTOR_DECAY else 32 if element_size > 2 else 64
    return width_of(K, most)


def of_factor(name: str, factor: Factor | None) -> dict[str, int]:
    """What a kernel is compiled for, of one factor with a coefficient."""
    heads, kind, own, sign = (1, 0, 1, 1) if factor is None else (
        factor.heads, factor.kind, factor.coefficient_heads, factor.sign)  # fmt: skip
    return {f"{name}_HEADS": heads, f"{name}_KIND": kind, f"{name}_COEFFICIENT_HEADS": own, f"{name}_SIGN": sign}


def sizes(layout: Layout) -> dict[str, int]:
    """What every stage is compiled for."""
    return {name: getattr(layout, name) for name in ("C", "R", "L", "N", "M", "Q")}


def prepare(query: Tensor, read: Factor | None, write: Tensor | None, lone_write: Tensor | None,
            log_decay: Tensor | None, layout: Layout, chunks: Chunks, scale: float) -> Prepared:  # fmt: skip
    """The arrays above, for contiguous inputs."""
    batch, time = query.shape[:2]
    rows, pairs, heads = (batch, time), chunks.count * layout.value_heads, layout.value_heads
    R, L, N, M, Q = layout.R, layout.L, layout.N, layout.M, layout.Q

    def vacant(*shape: int, there: bool = True, dtype: torch.dtype = query.dtype) -> Tensor | None:
        return query.new_empty(shape, dtype=dtype) if there else None

    queries = query.new_empty(*rows, 1, heads, layout.K)
    reads, writes = (vacant(*rows, R, heads, layout.K, there=R > 0) for _ in range(2))
    lone = vacant(*rows, L, heads, layout.K, there=L > 0)
    gram = vacant(pairs, N, N, there=R > 0, dtype=torch.float32)
    scores, lone_scores = vacant(pairs, Q, N, there=R > 0), vacant(pairs, Q, M, there=L > 0)
    lone_gram = vacant(pairs, N, M, there=R > 0 and L > 0)
    channels = (layout.K,) if layout.decay == VECTOR_DECAY else ()
    total = vacant(pairs, *channels, there=layout.decay != NO_DECAY, dtype=torch.float32)
    precision, full = float32_precision(query.device), query.element_size() > 2
    if pairs:
        launch = bind(
            gram_kernel, **sizes(layout), LEVELS=layout.levels, H=layout.heads, HV=heads, K=layout.K,
            BK=widest(layout.K, query.element_size(), layout.decay), DECAY=layout.decay, RAW=layout.raw,
            SEQUENTIAL=layout.sequential, **of_factor("READ", read),
            WRITE_HEADS=heads_of(write), LONE_HEADS=heads_of(lone_write), PACKED=chunks.packed, PRECISION=precision,
            num_warps=4, num_stages=1)  # fmt: skip
        vector, coefficient = (None, None) if read is None else (read.vector, read.coefficient)
        launch(pairs, query, vector, coefficient, write, lone_write, log_decay, queries, reads, writes, lone, gram,
               scores, lone_gram, lone_scores, total, chunks.table, chunks.time, chunks.per_sequence,
               scale)  # fmt: skip
    inverse = None
    if gram is not None:
        inverse = torch.empty_like(gram, dtype=query.dtype)
        if pairs:
            bind(inverse_kernel, N=N, SPLIT=not full, PRECISION=precision, num_warps=1, num_stages=1)(
                pairs, gram, inverse)  # fmt: skip
    return Prepared(queries, reads, writes, lone, inverse, scores, lone_gram, lone_scores, total)
