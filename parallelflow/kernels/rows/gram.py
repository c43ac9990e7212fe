"""Readers and writers as they meet the states, Gram matrices and totals, of all chunks at once (prepare.py has the
formulas)."""

import triton
import triton.language as tl

from parallelflow.kernels.chunks import locate_chunk
from parallelflow.kernels.prepare import decay_between
from parallelflow.kernels.rows import layout
from parallelflow.kernels.rows.factors import (
    boundary_factors,
    from_middle,
    in_halves,
    in_three,
    load_channel_decays,
    load_factor,
    load_rows,
    places,
    same_block,
    span,
    store_rows,
    to_end,
    token_sums,
)

WHOLE_CHUNK, MIDDLE_BLOCK = tl.constexpr(layout.WHOLE), tl.constexpr(layout.MIDDLE)


@triton.jit
def paired(sums, late, early, keep, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """``sums`` and the products of ``late`` and ``early`` rows where ``keep``."""
    found = tl.dot(late.to(DTYPE), tl.trans(early.to(DTYPE)), input_precision=PRECISION)
    return sums + tl.where(keep, found, 0.0)


@triton.jit
def gram_of_halves(sums, rows, tokens, decays, level, R: tl.constexpr, L: tl.constexpr, RAW: tl.constexpr,
                   PRECISION: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """``sums`` and the pairs of tokens in the two halves of blocks of 2^(level + 1)."""
    g, p, g_lone, p_lone = sums
    q, a, b, w = rows
    q_token, n_token, m_token = tokens
    q_factor, a_factor, b_factor, w_factor = boundary_factors(decays, tokens, level, R, L, RAW)
    q *= q_factor
    if R > 0:
        a *= a_factor
        b *= b_factor
        g = paired(g, a, b, in_halves(n_token, n_token, level), PRECISION, DTYPE)
        p = paired(p, q, b, in_halves(q_token, n_token, level), PRECISION, DTYPE)
    if L > 0:
        w *= w_factor
        p_lone = paired(p_lone, q, w, in_halves(q_token, m_token, level), PRECISION, DTYPE)
        if R > 0:
            g_lone = paired(g_lone, a, w, in_halves(n_token, m_token, level), PRECISION, DTYPE)
    return g, p, g_lone, p_lone


@triton.jit
def gram_of_channels(sums, widest, inputs, outputs, place, scale, FLOOR: tl.constexpr, BK: tl.constexpr,
                     C: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
                     M: tl.constexpr, Q: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
                     RAW: tl.constexpr, SEQUENTIAL: tl.constexpr, READ_HEADS: tl.constexpr, READ_KIND: tl.constexpr,
                     READ_COEFFICIENT_HEADS: tl.constexpr, READ_SIGN: tl.constexpr, WRITE_HEADS: tl.constexpr,
                     LONE_HEADS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What BK channels with decays of their own add to the Gram matrices, and to the widest span of a block; their
    readers, writers and total."""
    g, p, g_lone, p_lone = sums
    query, read, read_coefficient, write, lone_write, log_decay = inputs
    queries, reads, writes, lone, total = outputs
    first, length, flat, head, start = place
    DTYPE: tl.constexpr = query.dtype.element_ty
    BITS: tl.constexpr = LEVELS if FLOOR == WHOLE_CHUNK else 4 if FLOOR == MIDDLE_BLOCK else 0
    column = start + tl.arange(0, BK)
    q_token, q_place = places(Q, 1)
    n_token, n_place = places(N if R > 0 else Q, R if R > 0 else 1)
    m_token, m_place = places(M if L > 0 else Q, L if L > 0 else 1)
    decays = load_channel_decays(log_decay, first, length, head, column, Q, HV, K)
    whole = tl.sum(decays, 0)
    if FLOOR > 1:
        widest = tl.maximum(widest, span(decays, FLOOR))
    decays = in_three(decays)
    tl.store(total + flat * K + column, tl.exp2(whole), mask=column < K)
    if SEQUENTIAL:
        after = (n_token[:, None] == n_token[None, :]) & (n_place[:, None] > n_place[None, :])
    if FLOOR > 1:  # every pair inside a block is taken to the block's middle
        half = tl.exp2(0.5 * whole)[None, :]
        exponent = from_middle(decays, q_token, BITS, False)
        q_late = load_rows(query, first, length, head, column, Q, 1, HV, H, K) * (scale * tl.exp2(exponent))
        if FLOOR == WHOLE_CHUNK:  # what meets the states differs by the middle
            store_rows(queries, q_late * half, first, length, head, column, Q, 1, HV, K)
        q_late = q_late.to(DTYPE)
        if R > 0:
            if R > 1:
                exponent = from_middle(decays, n_token, BITS, False)
            b_early = load_rows(write, first, length, head, column, N, R, HV, WRITE_HEADS, K) * tl.exp2(-exponent)
            if FLOOR == WHOLE_CHUNK:
                store_rows(writes, b_early * half, first, length, head, column, N, R, HV, K)
            inside = same_block(q_token, n_token, BITS) | (q_token[:, None] == n_token[None, :])
            p = paired(p, q_late, b_early, inside, PRECISION, DTYPE)
            if RAW:
                exponent = from_middle(decays, n_token, BITS, True)
            a_late = load_factor(read, read_coefficient, first, length, head, column, N, R, HV, READ_HEADS, READ_KIND,
                                 READ_COEFFICIENT_HEADS, READ_SIGN, K) * tl.exp2(exponent)  # fmt: skip
            if FLOOR == WHOLE_CHUNK:
                store_rows(reads, a_late * half, first, length, head, column, N, R, HV, K)
            inside = same_block(n_token, n_token, BITS)
            if SEQUENTIAL and not RAW:
                inside = inside | after
            g = paired(g, a_late, b_early, inside, PRECISION, DTYPE)
        if L > 0:
            if R != L or RAW:
                exponent = from_middle(decays, m_token, BITS, False)
            w_early = load_rows(lone_write, first, length, head, column, M, L, HV, LONE_HEADS, K) * tl.exp2(-exponent)
            if FLOOR == WHOLE_CHUNK:
                store_rows(lone, w_early * half, first, length, head, column, M, L, HV, K)
            inside = same_block(q_token, m_token, BITS) | (q_token[:, None] == m_token[None, :])
            p_lone = paired(p_lone, q_late, w_early, inside, PRECISION, DTYPE)
            if R > 0:
                g_lone = paired(g_lone, a_late, w_early, same_block(n_token, m_token, BITS), PRECISION, DTYPE)
    if FLOOR != WHOLE_CHUNK or (SEQUENTIAL and RAW):
        q = load_rows(query, first, length, head, column, Q, 1, HV, H, K).to(tl.float32) * scale
        a, b, w = 0, 0, 0
        if R > 0:
            a = load_factor(read, read_coefficient, first, length, head, column, N, R, HV, READ_HEADS, READ_KIND,
                            READ_COEFFICIENT_HEADS, READ_SIGN, K)  # fmt: skip
            b = load_rows(write, first, length, head, column, N, R, HV, WRITE_HEADS, K).to(tl.float32)
            if SEQUENTIAL and (RAW or FLOOR == 1):
                g = paired(g, a, b, after, PRECISION, DTYPE)
        if L > 0:
            w = load_rows(lone_write, first, length, head, column, M, L, HV, LONE_HEADS, K).to(tl.float32)
    if FLOOR == 1:  # pairs of one token
        if R > 0:
            p = paired(p, q, b, q_token[:, None] == n_token[None, :], PRECISION, DTYPE)
        if L > 0:
            p_lone = paired(p_lone, q, w, q_token[:, None] == m_token[None, :], PRECISION, DTYPE)
    if FLOOR != WHOLE_CHUNK:
        rows, tokens = (q, a, b, w), (q_token, n_token, m_token)
        for level in range(BITS, LEVELS):  # the halves of blocks of more and more tokens
            g, p, g_lone, p_lone = gram_of_halves(
                (g, p, g_lone, p_lone), rows, tokens, decays, level, R, L, RAW, PRECISION, DTYPE)  # fmt: skip
        q_factor, a_factor, b_factor, w_factor = boundary_factors(decays, tokens, LEVELS, R, L, RAW)
        q *= q_factor
        if R > 0:
            a *= a_factor
            b *= b_factor
        if L > 0:
            w *= w_factor
        store_rows(queries, q, first, length, head, column, Q, 1, HV, K)
        if R > 0:
            store_rows(reads, a, first, length, head, column, N, R, HV, K)
            store_rows(writes, b, first, length, head, column, N, R, HV, K)
        if L > 0:
            store_rows(lone, w, first, length, head, column, M, L, HV, K)
    return g, p, g_lone, p_lone, widest


@triton.jit(do_not_specialize=["time", "per_sequence"])
def gram_kernel(query, read, read_coefficient, write, lone_write, log_decay,
                queries, reads, writes, lone, gram, scores, lone_gram, lone_scores, total, floors,
                table, time, per_sequence, scale,
                C: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
                M: tl.constexpr, Q: tl.constexpr,
                H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr,
                FLOOR: tl.constexpr, CENTRED: tl.constexpr, RAW: tl.constexpr, SEQUENTIAL: tl.constexpr,
                READ_HEADS: tl.constexpr, READ_KIND: tl.constexpr, READ_COEFFICIENT_HEADS: tl.constexpr,
                READ_SIGN: tl.constexpr, WRITE_HEADS: tl.constexpr, LONE_HEADS: tl.constexpr, COPY: tl.constexpr,
                PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Readers, writers, Gram matrices and total of one chunk and value head. Where channels have decays of their own
    the launch for one FLOOR tries it on the chunks that ``floors`` still holds for it or a smaller one, and writes what
    they turn out to need: the next launch does those over. COPY: whether writes are stored; without decay they are the
    input."""
    flat = tl.program_id(0).to(tl.int64)
    if DECAY == 2 and FLOOR != WHOLE_CHUNK:  # noqa: SIM102 - the first condition is settled while compiling
        if tl.load(floors + flat) > FLOOR:
            return
    chunk = flat // HV
    head = flat % HV
    first, length = locate_chunk(chunk, table, time, per_sequence, C, PACKED)
    DTYPE: tl.constexpr = query.dtype.element_ty
    q_token, q_place = places(Q, 1)
    n_token, n_place = places(N if R > 0 else 16, R if R > 0 else 1)
    m_token, m_place = places(M if L > 0 else 16, L if L > 0 else 1)
    g = tl.zeros([n_token.shape[0], n_token.shape[0]], tl.float32)
    p = tl.zeros([Q, n_token.shape[0]], tl.float32)
    g_lone = tl.zeros([n_token.shape[0], m_token.shape[0]], tl.float32)
    p_lone = tl.zeros([Q, m_token.shape[0]], tl.float32)
    if DECAY == 1:
        q_high, q_low, end = token_sums(log_decay, first, length, head, Q, 1, False, HV)
        tl.store(total + flat, tl.exp2(end.to(tl.float32)))
        if R > 0:
            a_high, a_low, _ = token_sums(log_decay, first, length, head, N, R, RAW, HV)
            b_high, b_low, _ = token_sums(log_decay, first, length, head, N, R, False, HV)
        if L > 0:
            l_high, l_low, _ = token_sums(log_decay, first, length, head, M, L, False, HV)
    widest = 0.0
    for start in range(0, K, BK):
        column = start + tl.arange(0, BK)
        if DECAY == 2:
            g, p, g_lone, p_lone, widest = gram_of_channels(
                (g, p, g_lone, p_lone), widest, (query, read, read_coefficient, write, lone_write, log_decay),
                (queries, reads, writes, lone, total), (first, length, flat, head, start), scale, FLOOR, BK, C, LEVELS,
                R, L, N, M, Q, H, HV, K, RAW, SEQUENTIAL, READ_HEADS, READ_KIND, READ_COEFFICIENT_HEADS, READ_SIGN,
                WRITE_HEADS, LONE_HEADS, PRECISION)  # fmt: skip
        else:
            q = load_rows(query, first, length, head, column, Q, 1, HV, H, K).to(tl.float32) * scale
            if R > 0:
                a = load_factor(read, read_coefficient, first, length, head, column, N, R, HV, READ_HEADS, READ_KIND,
                                READ_COEFFICIENT_HEADS, READ_SIGN, K)  # fmt: skip
                b = load_rows(write, first, length, head, column, N, R, HV, WRITE_HEADS, K).to(tl.float32)
                g += tl.dot(a.to(DTYPE), tl.trans(b.to(DTYPE)), input_precision=PRECISION)
                p += tl.dot(q.to(DTYPE), tl.trans(b.to(DTYPE)), input_precision=PRECISION)
            if L > 0:
                w = load_rows(lone_write, first, length, head, column, M, L, HV, LONE_HEADS, K).to(tl.float32)
                p_lone += tl.dot(q.to(DTYPE), tl.trans(w.to(DTYPE)), input_precision=PRECISION)
                if R > 0:
                    g_lone += tl.dot(a.to(DTYPE), tl.trans(w.to(DTYPE)), input_precision=PRECISION)
            if DECAY == 1:  # what meets the states
                q *= tl.exp2(q_high)[:, None]
                if R > 0:
                    a *= tl.exp2(a_high)[:, None]
                    b *= to_end(end, b_high, b_low)[:, None]
                if L > 0:
                    w *= to_end(end, l_high, l_low)[:, None]
            store_rows(queries, q, first, length, head, column, Q, 1, HV, K)
            if R > 0:
                store_rows(reads, a, first, length, head, column, N, R, HV, K)
                if COPY:
                    store_rows(writes, b, first, length, head, column, N, R, HV, K)
            if L > 0:
                store_rows(lone, w, first, length, head, column, M, L, HV, K)
    if DECAY == 2 and FLOOR > 1:
        LOWER: tl.constexpr = MIDDLE_BLOCK if FLOOR == WHOLE_CHUNK and C > MIDDLE_BLOCK else 1
        tl.store(floors + flat, tl.where(widest <= CENTRED, FLOOR, LOWER))
    if DECAY != 2:
        if R > 0:
            before = n_token[:, None] > n_token[None, :]
            if SEQUENTIAL:
                after = (n_token[:, None] == n_token[None, :]) & (n_place[:, None] > n_place[None, :])
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
