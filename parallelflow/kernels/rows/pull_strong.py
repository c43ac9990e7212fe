"""Gradients of the rows and of the decays (pull.py has the formulas) where a channel's decays are too strong for
the chunk to be centred: block size by block size, or the blocks of 16 tokens centred (factors.py)."""

import triton
import triton.language as tl

from parallelflow.kernels.chunks import locate_chunk
from parallelflow.kernels.gradient import load_state
from parallelflow.kernels.rows.factors import (
    boundary_factors,
    from_middle,
    in_halves,
    in_three,
    load_channel_decays,
    load_factor,
    load_rows,
    load_weights,
    places,
    same_block,
    store_rows,
)
from parallelflow.kernels.rows.layout import MIDDLE, MOST_CHUNKS, WHOLE
from parallelflow.kernels.rows.slopes import (
    from_here_on,
    load_own,
    load_pairs,
    meets,
    of_one_token,
    onto,
    own_and_later,
    own_to_queries,
    own_to_rows,
)

WHOLE_CHUNK, MIDDLE_BLOCK = tl.constexpr(WHOLE), tl.constexpr(MIDDLE)
MOST = tl.constexpr(MOST_CHUNKS)


@triton.jit
def through_pairs(gradients, slopes, rows, factors, pairs, R: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr):
    """``gradients`` of ``rows`` and ``slopes``, and what comes through ``pairs`` between which ``factors`` of both rows
    stand."""
    dq, da, db, dl = gradients
    q_slope, a_slope, b_slope, w_slope = slopes
    q, a, b, w = rows
    q_factor, a_factor, b_factor, w_factor = factors
    g, p, g_lone, p_lone = pairs
    DTYPE: tl.constexpr = p.dtype if R > 0 else p_lone.dtype
    q = (q * q_factor).to(DTYPE)
    q_sums = tl.zeros_like(dq)
    if R > 0:
        a = (a * a_factor).to(DTYPE)
        b = (b * b_factor).to(DTYPE)
        a_sums = onto(tl.zeros_like(da), g, b, PRECISION)
        q_sums = onto(q_sums, p, b, PRECISION)
        b_sums = onto(tl.zeros_like(db), tl.trans(g), a, PRECISION)
        b_sums = onto(b_sums, tl.trans(p), q, PRECISION)
        db += b_factor * b_sums
        b_slope += b.to(tl.float32) * b_sums
    if L > 0:
        w = (w * w_factor).to(DTYPE)
        q_sums = onto(q_sums, p_lone, w, PRECISION)
        w_sums = onto(tl.zeros_like(dl), tl.trans(p_lone), q, PRECISION)
        if R > 0:
            a_sums = onto(a_sums, g_lone, w, PRECISION)
            w_sums = onto(w_sums, tl.trans(g_lone), a, PRECISION)
        dl += w_factor * w_sums
        w_slope += w.to(tl.float32) * w_sums
    dq += q_factor * q_sums
    q_slope += q.to(tl.float32) * q_sums
    if R > 0:
        da += a_factor * a_sums
        a_slope += a.to(tl.float32) * a_sums
    return (dq, da, db, dl), (q_slope, a_slope, b_slope, w_slope)


@triton.jit
def through_halves(gradients, slopes, rows, tokens, pairs, decays, level, R: tl.constexpr, L: tl.constexpr,
                   RAW: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Through pairs of tokens in the two halves of blocks of 2^(level + 1)."""
    g, p, g_lone, p_lone = pairs
    q_token, n_token, m_token = tokens
    factors = boundary_factors(decays, tokens, level, R, L, RAW)
    if R > 0:
        g = meets(g, in_halves(n_token, n_token, level))
        p = meets(p, in_halves(q_token, n_token, level))
    if L > 0:
        p_lone = meets(p_lone, in_halves(q_token, m_token, level))
        if R > 0:
            g_lone = meets(g_lone, in_halves(n_token, m_token, level))
    return through_pairs(gradients, slopes, rows, factors, (g, p, g_lone, p_lone), R, L, PRECISION)


@triton.jit
def through_blocks(gradients, slopes, rows, tokens, pairs, decays, level, R: tl.constexpr, L: tl.constexpr,
                   RAW: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Through pairs of different tokens in blocks of 2^level, taken to the block's middle."""
    g, p, g_lone, p_lone = pairs
    q_token, n_token, m_token = tokens
    exponent = from_middle(decays, q_token, level, False)
    q_factor = tl.exp2(exponent)
    a_factor, b_factor, w_factor = 0, 0, 0
    if R > 0:
        if R > 1:
            exponent = from_middle(decays, n_token, level, False)
        b_factor = tl.exp2(-exponent)
        a_factor = tl.exp2(from_middle(decays, n_token, level, True) if RAW else exponent)
        g = meets(g, same_block(n_token, n_token, level))
        p = meets(p, same_block(q_token, n_token, level))
    if L > 0:
        w_factor = b_factor if R == L else tl.exp2(-from_middle(decays, m_token, level, False))
        p_lone = meets(p_lone, same_block(q_token, m_token, level))
        if R > 0:
            g_lone = meets(g_lone, same_block(n_token, m_token, level))
    factors = (q_factor, a_factor, b_factor, w_factor)
    return through_pairs(gradients, slopes, rows, factors, (g, p, g_lone, p_lone), R, L, PRECISION)


@triton.jit(do_not_specialize=["time", "per_sequence", "tokens", "count", "share"])
def pull_strong_kernel(query, read, read_coefficient, write, lone_write, log_decay, solution, given, d_source, d_output,
                       entry_states, exit_gradients, total, floors, gram, scores, lone_gram, lone_scores, own,
                       lone_own, d_query, d_read, d_read_coefficient, d_write, d_lone, d_log_decay,
                       table, time, per_sequence, tokens, scale, count, share,
                       C: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
                       M: tl.constexpr, Q: tl.constexpr,
                       H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                       BV: tl.constexpr, TILES: tl.constexpr, DECAY: tl.constexpr,
                       RAW: tl.constexpr, SEQUENTIAL: tl.constexpr, READ_HEADS: tl.constexpr, READ_KIND: tl.constexpr,
                       READ_COEFFICIENT_HEADS: tl.constexpr, READ_SIGN: tl.constexpr, WRITE_HEADS: tl.constexpr,
                       LONE_HEADS: tl.constexpr, GIVEN_HEADS: tl.constexpr, TIED: tl.constexpr, PACKED: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of a tile of BK key channels, of those of ``share`` chunks that are not to be centred; of a tied
    coefficient that tile's part."""
    tile = tl.program_id(0) % TILES
    DTYPE: tl.constexpr = query.dtype.element_ty
    least = (tl.program_id(0) // TILES).to(tl.int64) * share
    several = tl.arange(0, MOST)
    there = (several < share) & (least + several < count)
    found = tl.load(floors + least + several, mask=there, other=WHOLE_CHUNK)
    if tl.min(found, 0) == WHOLE_CHUNK:
        return
    # What is the same for all chunks is not kept from one to the next: registers are short.
    for place in tl.range(0, tl.minimum(share, count - least), disable_licm=True):
        flat = least + place
        floor = tl.load(floors + flat)
        if floor != WHOLE_CHUNK:
            head = flat % HV
            first, length = locate_chunk(flat // HV, table, time, per_sequence, C, PACKED)
            column = tile * BK + tl.arange(0, BK)
            q_token, q_place = places(Q, 1)
            n_token, n_place = places(N if R > 0 else Q, R if R > 0 else 1)
            m_token, m_place = places(M if L > 0 else Q, L if L > 0 else 1)
            dq = tl.zeros([Q, BK], tl.float32)
            da = tl.zeros([n_token.shape[0], BK], tl.float32)
            db, a, b = da, da, da
            dl = tl.zeros([m_token.shape[0], BK], tl.float32)
            w = dl
            overlap = tl.zeros([BK], tl.float32)
            for start in range(0, V, BV):
                channel = start + tl.arange(0, BV)
                state = load_state(entry_states + flat * K * V, channel, column, K, V)
                d_state = load_state(exit_gradients + flat * K * V, channel, column, K, V)
                do = load_rows(d_output, first, length, head, channel, Q, 1, HV, HV, V)
                dq = onto(dq, do, state, PRECISION)
                if R > 0:
                    du = load_rows(d_source, first, length, head, channel, N, R, HV, HV, V)
                    x = load_rows(solution, first, length, head, channel, N, R, HV, HV, V)
                    da = onto(da, du, state, PRECISION)
                    db = onto(db, x, d_state, PRECISION)
                if L > 0:
                    u = load_rows(given, first, length, head, channel, M, L, HV, GIVEN_HEADS, V)
                    dl = onto(dl, u, d_state, PRECISION)
                overlap += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
            # through the states
            decays = in_three(load_channel_decays(log_decay, first, length, head, column, Q, HV, K))
            ends = overlap * tl.load(total + flat * K + column, mask=column < K, other=0.0)
            q = load_rows(query, first, length, head, column, Q, 1, HV, H, K).to(tl.float32) * scale
            g, p, g_lone, p_lone = 0, 0, 0, 0
            lying = (q_token, n_token, m_token)
            q_factor, a_factor, b_factor, w_factor = boundary_factors(decays, lying, LEVELS, R, L, RAW)
            dq *= q_factor
            if R > 0:
                a = load_factor(read, read_coefficient, first, length, head, column, N, R, HV, READ_HEADS, READ_KIND,
                                READ_COEFFICIENT_HEADS, READ_SIGN, K)  # fmt: skip
                b = load_rows(write, first, length, head, column, N, R, HV, WRITE_HEADS, K).to(tl.float32)
                g = load_pairs(gram, flat, N, N)
                p = load_pairs(scores, flat, Q, N)
                da *= a_factor
                db *= b_factor
                ends += tl.sum(b * db, 0)
            if L > 0:
                w = load_rows(lone_write, first, length, head, column, M, L, HV, LONE_HEADS, K).to(tl.float32)
                p_lone = load_pairs(lone_scores, flat, Q, M)
                if R > 0:
                    g_lone = load_pairs(lone_gram, flat, N, M)
                dl *= w_factor
                ends += tl.sum(w * dl, 0)
            # through the pairs of different tokens
            gradients, rows = (dq, da, db, dl), (q, a, b, w)
            slopes, pairs = (q * dq, a * da, b * db, w * dl), (g, p, g_lone, p_lone)
            lowest = 0
            if C > MIDDLE_BLOCK:  # noqa: SIM102 - settled while compiling
                if floor == MIDDLE_BLOCK:
                    lowest = 4
                    gradients, slopes = through_blocks(
                        gradients, slopes, rows, lying, pairs, decays, 4, R, L, RAW, PRECISION
                    )
            for level in range(lowest, LEVELS):
                gradients, slopes = through_halves(
                    gradients, slopes, rows, lying, pairs, decays, level, R, L, RAW, PRECISION
                )
            dq, da, db, dl = gradients
            slope, a_slope, b_slope, w_slope = slopes
            if R == 1:  # rows that lie like the queries join them
                slope += a_slope - b_slope
            if L == 1:
                slope -= w_slope
            sums = own_and_later(slope, d_log_decay, first, length, head, column, Q, HV, K) + ends[None, :]
            if R == 1 and RAW:
                sums -= a_slope
            if R > 1:
                sums += from_here_on(n_token, a_slope, RAW, Q) - from_here_on(n_token, b_slope, False, Q)
            if L > 1:
                sums -= from_here_on(m_token, w_slope, False, Q)
            store_rows(d_log_decay, sums, first, length, head, column, Q, 1, HV, K)
            # through the pairs of one token, where no decay comes between
            if R > 0:
                dq = own_to_queries(dq, load_own(own, flat, N), b, q_token, n_token, R, PRECISION)
                db = own_to_rows(db, load_own(own, flat, N), q, q_token, n_token, R, PRECISION, DTYPE)
                if SEQUENTIAL:
                    da = onto(da, of_one_token(g, n_token), b, PRECISION)
                    db = onto(db, tl.trans(of_one_token(g, n_token)), a, PRECISION)
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
                dq = own_to_queries(dq, load_own(lone_own, flat, M), w, q_token, m_token, L, PRECISION)
                dl = own_to_rows(
                    dl, load_own(lone_own, flat, M), q, q_token, m_token, L, PRECISION, query.dtype.element_ty
                )
                store_rows(d_lone, dl, first, length, head, column, M, L, HV, K)
            store_rows(d_query, dq * scale, first, length, head, column, Q, 1, HV, K)
