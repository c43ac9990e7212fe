"""Gradients of the rows and of the decay, of all chunks at once, one program a chunk, value head and tile of channels.

With S the state at a chunk's entry and E the gradient of the one at its exit, D the decay between two tokens,

    da = e^r (dU S^T) + (d_gram D) b + (d_lone_gram D) l            dq = scale (e^c (dO S^T) + (d_scores D) b + …)
    db = e^{c_C - c} (X E^T) + (d_gram D)^T a + (d_scores D)^T q    dl likewise, with u for X

Every factor of a pair depends on c_t - c_s alone, so the decay sums get reader times its gradient less writer times
its gradient, and e^{c_C} what reaches the exit state; a token's log-decay gets the sum of those from it on. (Raw reads:
from the next token on.)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallelflow.kernels.chunks import Chunks, locate_chunk
from parallelflow.kernels.gradient import load_state
from parallelflow.kernels.launch import bind
from parallelflow.kernels.products import float32_precision
from parallelflow.kernels.rows.factors import (
    from_boundary,
    halves_of_a_block,
    load_channel_decays,
    load_factor,
    load_rows,
    load_weights,
    places,
    store_rows,
    to_boundary,
    to_end,
    token_sums,
)
from parallelflow.kernels.rows.layout import NO_DECAY, VECTOR_DECAY, Factor, Layout, heads_of, width_of
from parallelflow.kernels.rows.pairs import Pairs
from parallelflow.kernels.rows.prepare import of_factor, sizes


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


@triton.jit
def load_pairs(base, flat, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(base + flat * (ROWS * COLUMNS) + at)


@triton.jit
def onto(sums, pairs, rows, PRECISION: tl.constexpr):
    """``sums + pairs rows``."""
    return tl.dot(pairs, rows.to(pairs.dtype), sums, input_precision=PRECISION)


@triton.jit
def meets(pairs, keep):
    return tl.where(keep, pairs, tl.zeros_like(pairs))


@triton.jit
def from_here_on(token, rows, STRICT: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of rows over all later tokens, and the own one unless STRICT: [rows, columns] -> [Q, columns]."""
    here = tl.arange(0, Q)[:, None]
    later = token[None, :] > here if STRICT else token[None, :] >= here
    return tl.dot(later.to(tl.float32), rows, input_precision=PRECISION)


@triton.jit
def sums_from_here_on(token, values, STRICT: tl.constexpr, Q: tl.constexpr):
    """The same of one number a row."""
    here = tl.arange(0, Q)[:, None]
    later = token[None, :] > here if STRICT else token[None, :] >= here
    return tl.sum(tl.where(later, values[None, :], 0.0), 1)


@triton.jit(do_not_specialize=["time", "per_sequence", "tokens"])
def pull_kernel(query, read, read_coefficient, write, lone_write, log_decay, solution, given, d_source, d_output,
                entry_states, exit_gradients, total, gram, scores, lone_gram, lone_scores,
                d_query, d_read, d_read_coefficient, d_write, d_lone, d_log_decay,
                table, time, per_sequence, tokens, scale,
                C: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
                M: tl.constexpr, Q: tl.constexpr,
                H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                BV: tl.constexpr, TILES: tl.constexpr, DECAY: tl.constexpr, RAW: tl.constexpr,
                SEQUENTIAL: tl.constexpr, READ_HEADS: tl.constexpr, READ_KIND: tl.constexpr,
                READ_COEFFICIENT_HEADS: tl.constexpr, READ_SIGN: tl.constexpr, WRITE_HEADS: tl.constexpr,
                LONE_HEADS: tl.constexpr, GIVEN_HEADS: tl.constexpr, TIED: tl.constexpr, PACKED: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of one tile of key channels; of a scalar decay that tile's part."""
    tile = tl.program_id(0) % TILES
    flat = (tl.program_id(0) // TILES).to(tl.int64)
    head = flat % HV
    first, length = locate_chunk(flat // HV, table, time, per_sequence, C, PACKED)
    column = tile * BK + tl.arange(0, BK)
    dq = tl.zeros([Q, BK], tl.float32)
    if R > 0:
        da = tl.zeros([N, BK], tl.float32)
        db = tl.zeros([N, BK], tl.float32)
    if L > 0:
        dl = tl.zeros([M, BK], tl.float32)
    overlap = tl.zeros([BK], tl.float32)
    for start in range(0, V, BV):
        channel = start + tl.arange(0, BV)
        state = load_state(entry_states + flat * K * V, channel, column, K, V)
        d_state = load_state(exit_gradients + flat * K * V, channel, column, K, V)
        do = load_rows(d_output, first, length, head, channel, Q, 1, HV, HV, V)
        dq = tl.dot(do, state, dq, input_precision=PRECISION)
        if R > 0:
            du = load_rows(d_source, first, length, head, channel, N, R, HV, HV, V)
            x = load_rows(solution, first, length, head, channel, N, R, HV, HV, V)
            da = tl.dot(du, state, da, input_precision=PRECISION)
            db = tl.dot(x, d_state, db, input_precision=PRECISION)
        if L > 0:
            u = load_rows(given, first, length, head, channel, M, L, HV, GIVEN_HEADS, V)
            dl = tl.dot(u, d_state, dl, input_precision=PRECISION)
        if DECAY > 0:
            overlap += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    q = load_rows(query, first, length, head, column, Q, 1, HV, H, K).to(tl.float32) * scale
    q_token, q_place = places(Q, 1)
    p = tl.zeros([Q, 16], tl.float32)
    if R > 0:
        n_token, n_place = places(N, R)
        a = load_factor(read, read_coefficient, first, length, head, column, N, R, HV, READ_HEADS, READ_KIND,
                        READ_COEFFICIENT_HEADS, READ_SIGN, K)  # fmt: skip
        b = load_rows(write, first, length, head, column, N, R, HV, WRITE_HEADS, K).to(tl.float32)
        g = load_pairs(gram, flat, N, N)
        p = load_pairs(scores, flat, Q, N)
    if L > 0:
        m_token, m_place = places(M, L)
        w = load_rows(lone_write, first, length, head, column, M, L, HV, LONE_HEADS, K).to(tl.float32)
        p_lone = load_pairs(lone_scores, flat, Q, M)
        if R > 0:
            g_lone = load_pairs(lone_gram, flat, N, M)
    # through the states
    if DECAY == 1:
        q_high, q_low, end = token_sums(log_decay, first, length, head, Q, 1, False, HV)
        dq *= tl.exp2(q_high)[:, None]
        ends = overlap * tl.load(total + flat)
        if R > 0:
            a_high, a_low, end = token_sums(log_decay, first, length, head, N, R, RAW, HV)
            b_high, b_low, end = token_sums(log_decay, first, length, head, N, R, False, HV)
            da *= tl.exp2(a_high)[:, None]
            db *= to_end(end, b_high, b_low)[:, None]
            ends += tl.sum(b * db, 0)
        if L > 0:
            l_high, l_low, end = token_sums(log_decay, first, length, head, M, L, False, HV)
            dl *= to_end(end, l_high, l_low)[:, None]
            ends += tl.sum(w * dl, 0)
    if DECAY == 2:
        q_decays = load_channel_decays(log_decay, first, length, head, column, 0, Q, 1, HV, K)
        q_factor = from_boundary(q_decays, C, 1, False)
        dq *= q_factor
        ends = overlap * tl.load(total + flat * K + column, mask=column < K, other=0.0)
        if R > 0:
            a_decays = load_channel_decays(log_decay, first, length, head, column, -1 if RAW else 0, N, R, HV, K)
            b_decays = load_channel_decays(log_decay, first, length, head, column, 1, N, R, HV, K)
            da *= q_factor if R == 1 and not RAW else from_boundary(a_decays, C, R, RAW)
            b_factor = to_boundary(b_decays, C, R)
            db *= b_factor
            ends += tl.sum(b * db, 0)
        if L > 0:
            w_decays = load_channel_decays(log_decay, first, length, head, column, 1, M, L, HV, K)
            dl *= b_factor if R == L else to_boundary(w_decays, C, L)
            ends += tl.sum(w * dl, 0)
    # through the pairs of different tokens
    if DECAY == 2:
        for level in tl.static_range(LEVELS):
            q_factor = from_boundary(q_decays, 1 << level, 1, False)
            q_sums = tl.zeros([Q, BK], tl.float32)
            if R > 0:
                a_factor = q_factor if R == 1 and not RAW else from_boundary(a_decays, 1 << level, R, RAW)
                b_factor = to_boundary(b_decays, 1 << level, R)
                here = meets(g, halves_of_a_block(n_token, n_token, 1 << level))
                asked = meets(p, halves_of_a_block(q_token, n_token, 1 << level))
                a_sums = onto(tl.zeros([N, BK], tl.float32), here, b * b_factor, PRECISION)
                q_sums = onto(q_sums, asked, b * b_factor, PRECISION)
                b_sums = onto(tl.zeros([N, BK], tl.float32), tl.trans(here), a * a_factor, PRECISION)
                b_sums = onto(b_sums, tl.trans(asked), q * q_factor, PRECISION)
                db += b_factor * b_sums
            if L > 0:
                w_factor = b_factor if R == L else to_boundary(w_decays, 1 << level, L)
                asked = meets(p_lone, halves_of_a_block(q_token, m_token, 1 << level))
                q_sums = onto(q_sums, asked, w * w_factor, PRECISION)
                w_sums = onto(tl.zeros([M, BK], tl.float32), tl.trans(asked), q * q_factor, PRECISION)
                if R > 0:
                    here = meets(g_lone, halves_of_a_block(n_token, m_token, 1 << level))
                    a_sums = onto(a_sums, here, w * w_factor, PRECISION)
                    w_sums = onto(w_sums, tl.trans(here), a * a_factor, PRECISION)
                dl += w_factor * w_sums
            dq += q_factor * q_sums
            if R > 0:
                da += a_factor * a_sums
    else:
        if R > 0:
            asked = meets(p, q_token[:, None] != n_token[None, :])
            here = g
            if SEQUENTIAL:
                here = meets(g, n_token[:, None] != n_token[None, :])
            dq = onto(dq, asked, b, PRECISION)
            da = onto(da, here, b, PRECISION)
            db = onto(db, tl.trans(here), a, PRECISION)
            db = onto(db, tl.trans(asked), q, PRECISION)
        if L > 0:
            asked = meets(p_lone, q_token[:, None] != m_token[None, :])
            dq = onto(dq, asked, w, PRECISION)
            dl = onto(dl, tl.trans(asked), q, PRECISION)
            if R > 0:
                da = onto(da, g_lone, w, PRECISION)
                dl = onto(dl, tl.trans(g_lone), a, PRECISION)
    # Decays do not come between pairs of one token: those are added last, for in the decays' gradients they would
    # cancel, and leave their rounding.
    if DECAY == 1:
        sums = sums_from_here_on(q_token, tl.sum(q * dq, 1), False, Q) + tl.sum(ends, 0)
        if R > 0:
            sums += sums_from_here_on(n_token, tl.sum(a * da, 1), RAW, Q)
            sums -= sums_from_here_on(n_token, tl.sum(b * db, 1), False, Q)
        if L > 0:
            sums -= sums_from_here_on(m_token, tl.sum(w * dl, 1), False, Q)
        at = (tile.to(tl.int64) * tokens + first + q_token) * HV + head
        tl.store(d_log_decay + at, sums, mask=q_token < length)
    if DECAY == 2:
        exponents = from_here_on(q_token, q * dq, False, Q, PRECISION) + ends[None, :]
        if R > 0:
            exponents += from_here_on(n_token, a * da, RAW, Q, PRECISION)
            exponents -= from_here_on(n_token, b * db, False, Q, PRECISION)
        if L > 0:
            exponents -= from_here_on(m_token, w * dl, False, Q, PRECISION)
        store_rows(d_log_decay, exponents, first, length, head, column, Q, 1, HV, K)
    if R > 0:
        own = meets(p, q_token[:, None] == n_token[None, :])
        dq = onto(dq, own, b, PRECISION)
        db = onto(db, tl.trans(own), q, PRECISION)
        if SEQUENTIAL:
            own = meets(g, n_token[:, None] == n_token[None, :])
            da = onto(da, own, b, PRECISION)
            db = onto(db, tl.trans(own), a, PRECISION)
    if L > 0:
        own = meets(p_lone, q_token[:, None] == m_token[None, :])
        dq = onto(dq, own, w, PRECISION)
        dl = onto(dl, tl.trans(own), q, PRECISION)
    store_rows(d_query, dq * scale, first, length, head, column, Q, 1, HV, K)
    if R > 0:
        if TIED:
            at = ((tile.to(tl.int64) * tokens + first + n_token) * R + n_place) * HV + head
            inside = (n_token < length) & (n_place < R)
            tl.store(d_read_coefficient + at, READ_SIGN * tl.sum(b * da, 1), mask=inside)
            weight = load_weights(read_coefficient, first, length, head, N, R, HV, READ_COEFFICIENT_HEADS)
            db += READ_SIGN * weight[:, None] * da
        else:
            store_rows(d_read, da, first, length, head, column, N, R, HV, K)
        store_rows(d_write, db, first, length, head, column, N, R, HV, K)
    if L > 0:
        store_rows(d_lone, dl, first, length, head, column, M, L, HV, K)


def pull(query: Tensor, read: Factor | None, write: Tensor | None, lone_write: Tensor | None,
         log_decay: Tensor | None, solution: Tensor | None, given: Tensor | None, d_source: Tensor | None,
         d_output: Tensor, entry_states: Tensor, exit_gradients: Tensor, total: Tensor | None, pairs: Pairs,
         layout: Layout, chunks: Chunks, scale: float) -> Pulled:  # fmt: skip
    """The gradients above, for contiguous arrays."""
    batch, time = query.shape[:2]
    heads, R, L = layout.value_heads, layout.R, layout.L
    width = width_of(layout.K, 16 if layout.decay == VECTOR_DECAY else 32)
    tiles = triton.cdiv(layout.K, width)

    def vacant(rows: int, own: int) -> Tensor:
        dtype = query.dtype if own == heads else torch.float32
        return query.new_empty(batch, time, rows, heads, layout.K, dtype=dtype)

    tied = read is not None and read.vector is write and read.kind == 1
    d_query, d_read, d_read_coefficient, d_write, d_lone = vacant(1, layout.heads), None, None, None, None
    if read is not None and write is not None:
        d_write = vacant(R, write.shape[-2])
        if tied:
            d_read_coefficient = query.new_empty(tiles, batch, time, R, heads, dtype=torch.float32)
        else:
            d_read = vacant(R, heads if read.kind == 0 and read.sign == 1 and read.heads == heads else 0)
    if lone_write is not None:
        d_lone = vacant(L, lone_write.shape[-2])
    d_log_decay = None
    if layout.decay != NO_DECAY:
        shape = (1, batch, time, heads, layout.K) if layout.decay == VECTOR_DECAY else (tiles, batch, time, heads)
        d_log_decay = query.new_empty(shape, dtype=torch.float32)
    count = chunks.count * heads * tiles
    if count:
        launch = bind(
            pull_kernel, **sizes(layout), LEVELS=layout.levels, H=layout.heads, HV=heads, K=layout.K, V=layout.V,
            BK=width, BV=width_of(layout.V, 32), TILES=tiles, DECAY=layout.decay, RAW=layout.raw,
            SEQUENTIAL=layout.sequential, **of_factor("READ", read), WRITE_HEADS=heads_of(write),
            LONE_HEADS=heads_of(lone_write), GIVEN_HEADS=heads_of(given), TIED=tied, PACKED=chunks.packed,
            PRECISION=float32_precision(query.device), num_warps=4, num_stages=1)  # fmt: skip
        vector, coefficient = (None, None) if read is None else (read.vector, read.coefficient)
        launch(count, query, vector, coefficient, write, lone_write, log_decay, solution, given, d_source, d_output,
               entry_states, exit_gradients, total, *pairs, d_query, d_read, d_read_coefficient, d_write, d_lone,
               d_log_decay, chunks.table, chunks.time, chunks.per_sequence, batch * time, scale)  # fmt: skip
    if d_read_coefficient is not None:
        d_read_coefficient = d_read_coefficient.sum(0)
    d_log_decay = None if d_log_decay is None else d_log_decay.sum(0)
    return Pulled(d_query, d_read, d_read_coefficient, d_write, d_lone, d_log_decay)
