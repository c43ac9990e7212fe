"""Gradients of the rows and of the decay (pull.py has the formulas), readers first, then writers.

No decay, one a head, or one a channel where the whole chunk may be centred (factors.py). A chunk whose decays are
stronger is left to ``pull_strong.py``.
"""

import triton
import triton.language as tl

from parallelflow.kernels.chunks import locate_chunk
from parallelflow.kernels.gradient import load_state
from parallelflow.kernels.rows.factors import (
    in_three,
    load_channel_decays,
    load_rows,
    load_weights,
    places,
    store_rows,
    sums_from,
    sums_to,
    times_coefficient,
    to_end,
    token_sums,
    weighted,
)
from parallelflow.kernels.rows.layout import WHOLE
from parallelflow.kernels.rows.slopes import (
    from_here_on,
    load_own,
    load_pairs,
    of_one_token,
    of_others,
    onto,
    own_to_queries,
    own_to_rows,
    sums_from_here_on,
)

WHOLE_CHUNK = tl.constexpr(WHOLE)


@triton.jit(do_not_specialize=["time", "per_sequence", "tokens"])
def pull_kernel(query, read, read_coefficient, write, lone_write, log_decay, solution, given, d_source, d_output,
                entry_states, exit_gradients, total, floors, gram, scores, lone_gram, lone_scores, own, lone_own,
                d_query, d_read, d_read_coefficient, d_write, d_lone, d_log_decay,
                table, time, per_sequence, tokens, scale, triangle,
                C: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
                M: tl.constexpr, Q: tl.constexpr,
                H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                BV: tl.constexpr, TILES: tl.constexpr, DECAY: tl.constexpr, RAW: tl.constexpr,
                SEQUENTIAL: tl.constexpr, READ_HEADS: tl.constexpr, READ_KIND: tl.constexpr,
                READ_COEFFICIENT_HEADS: tl.constexpr, READ_SIGN: tl.constexpr, WRITE_HEADS: tl.constexpr,
                LONE_HEADS: tl.constexpr, GIVEN_HEADS: tl.constexpr, TIED: tl.constexpr, PACKED: tl.constexpr,
                PRECISION: tl.constexpr, BO: tl.constexpr):  # fmt: skip
    """Gradients of one tile of BK key channels; of a scalar decay and of a tied coefficient that tile's part."""
    tile = tl.program_id(0) % TILES
    flat = (tl.program_id(0) // TILES).to(tl.int64)
    head = flat % HV
    first, length = locate_chunk(flat // HV, table, time, per_sequence, C, PACKED)
    column = tile * BK + tl.arange(0, BK)
    DTYPE: tl.constexpr = query.dtype.element_ty
    q_token, q_place = places(Q, 1)
    n_token, n_place = places(N if R > 0 else Q, R if R > 0 else 1)
    m_token, m_place = places(M if L > 0 else Q, L if L > 0 else 1)
    # All that does not go through the loop waits at once, with the number that says whether the chunk is for here.
    if DECAY == 2:
        floor = tl.load(floors + flat)
        decays = load_channel_decays(log_decay, first, length, head, column, Q, HV, K)
        token = tl.arange(0, Q)
        ones = tl.load(triangle + token[:, None] * 64 + token[None, :])
    q = load_rows(query, first, length, head, column, Q, 1, HV, H, K)
    if R > 0:
        b = load_rows(write, first, length, head, column, N, R, HV, WRITE_HEADS, K)
        if TIED:
            weight = load_weights(read_coefficient, first, length, head, N, R, HV, READ_COEFFICIENT_HEADS)
        else:
            a = load_rows(read, first, length, head, column, N, R, HV, READ_HEADS, K)
        g = load_pairs(gram, flat, N, N)
        p = load_pairs(scores, flat, Q, N)
        if DECAY > 0:
            own_pairs = load_own(own, flat, N)
    if L > 0:
        w = load_rows(lone_write, first, length, head, column, M, L, HV, LONE_HEADS, K)
        p_lone = load_pairs(lone_scores, flat, Q, M)
        if R > 0:
            g_lone = load_pairs(lone_gram, flat, N, M)
        if DECAY > 0:
            lone_own_pairs = load_own(lone_own, flat, M)
    if DECAY == 2:  # noqa: SIM102 - settled while compiling
        if floor != WHOLE_CHUNK:
            return
    # through the states, in one pass over the values
    dq = tl.zeros([Q, BK], tl.float32)
    if R > 0:
        da = tl.zeros([N, BK], tl.float32)
        db = tl.zeros([N, BK], tl.float32)
    if L > 0:
        dl = tl.zeros([M, BK], tl.float32)
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
    if TIED:
        a = READ_SIGN * weight[:, None] * b
    elif R > 0:
        a = times_coefficient(a, read_coefficient, first, length, head, column, N, R, HV, READ_KIND,
                              READ_COEFFICIENT_HEADS, READ_SIGN, K)  # fmt: skip
    # Vector decays: all in units of the chunk's middle until it is summed; what meets the states differs by ``half``.
    if DECAY == 2:
        middle = 0.5 * tl.sum(decays, 0)[None, :]
        half = tl.exp2(middle)
        parts = in_three(decays)
        q_exponent = weighted(ones, parts) - middle
        n_exponent, m_exponent = q_exponent, q_exponent
        if R > 1:
            n_exponent = sums_to(triangle, n_token, parts) - middle
        if L > 1:
            m_exponent = sums_to(triangle, m_token, parts) - middle
        a_exponent = n_exponent
        if RAW and R == 1:
            a_exponent = n_exponent - decays
        if RAW and R > 1:
            a_exponent = sums_to(triangle, n_token - 1, parts) - middle
        dq *= half
        if R > 0:
            da *= half
            db *= half
        if L > 0:
            dl *= half
        ends = tl.zeros([BK], tl.float32)
    if DECAY == 1:
        ends = tl.zeros([BK], tl.float32)
        q_high, q_low, end = token_sums(log_decay, first, length, head, Q, 1, False, HV)
        dq *= tl.exp2(q_high)[:, None]
        if R > 0:
            a_high, a_low, end = token_sums(log_decay, first, length, head, N, R, RAW, HV)
            da *= tl.exp2(a_high)[:, None]
            b_high, b_low, end = token_sums(log_decay, first, length, head, N, R, False, HV)
            db *= to_end(end, b_high, b_low)[:, None]
        if L > 0:
            l_high, l_low, end = token_sums(log_decay, first, length, head, M, L, False, HV)
            dl *= to_end(end, l_high, l_low)[:, None]
    # readers, through the pairs of different tokens
    if R > 0:
        b_early = b
        if DECAY == 2:
            b_early = (b * tl.exp2(-n_exponent)).to(DTYPE)
        if DECAY > 0:
            ends += tl.sum(b_early.to(tl.float32) * db, 0)
    if L > 0:
        w_early = w
        if DECAY == 2:
            w_early = (w * tl.exp2(-m_exponent)).to(DTYPE)
        if DECAY > 0:
            ends += tl.sum(w_early.to(tl.float32) * dl, 0)
    if R > 0:
        dq = onto(dq, p, b_early, PRECISION)
        g_others = g
        if SEQUENTIAL and DECAY > 0:
            g_others = of_others(g, n_token)
        da = onto(da, g_others, b_early, PRECISION)
    if L > 0:
        dq = onto(dq, p_lone, w_early, PRECISION)
        if R > 0:
            da = onto(da, g_lone, w_early, PRECISION)
    # Decays do not come between pairs of one token: those are added last, for in the decays' gradients they would
    # cancel, and leave their rounding.
    q_late = q.to(tl.float32) * scale
    if DECAY == 2:
        factor = tl.exp2(q_exponent)
        q_late = (q_late * factor).to(DTYPE)
        slope = q_late.to(tl.float32) * dq
        dq *= factor
    if DECAY == 1:
        sums = sums_from_here_on(q_token, tl.sum(q_late * dq, 1), False, Q)
    if DECAY > 0:
        if R > 0:
            dq = own_to_queries(dq, own_pairs, b, q_token, n_token, R, PRECISION)
        if L > 0:
            dq = own_to_queries(dq, lone_own_pairs, w, q_token, m_token, L, PRECISION)
    store_rows(d_query, dq * scale, first, length, head, column, Q, 1, HV, K)
    if R > 0:
        a_late = a
        if DECAY == 2:
            factor = tl.exp2(a_exponent)
            a_late = (a * factor).to(DTYPE)
            a_slope = a_late.to(tl.float32) * da
            if R == 1:  # rows that lie like the queries join them
                slope += a_slope
            else:
                later = from_here_on(n_token, a_slope, RAW, Q)
            da *= factor
        if DECAY == 1:
            sums += sums_from_here_on(n_token, tl.sum(a * da, 1), RAW, Q)
        if SEQUENTIAL and DECAY > 0:
            da = onto(da, of_one_token(g, n_token), b, PRECISION)
        if TIED:
            at = (tile.to(tl.int64) * tokens + first) * R * HV + head + (n_token * R + n_place) * HV
            inside = (n_token < length) & (n_place < R)
            tl.store(d_read_coefficient + at, READ_SIGN * tl.sum(b.to(tl.float32) * da, 1), mask=inside)
            da *= READ_SIGN * weight[:, None]
        else:
            store_rows(d_read, da, first, length, head, column, N, R, HV, K)
        # writers, through the pairs of different tokens
        db = onto(db, tl.trans(p), q_late, PRECISION)
        db = onto(db, tl.trans(g_others), a_late, PRECISION)
        if DECAY == 1:
            sums -= sums_from_here_on(n_token, tl.sum(b.to(tl.float32) * db, 1), False, Q)
        if DECAY == 2:
            b_slope = b_early.to(tl.float32) * db
            if R == 1:
                slope -= b_slope
            else:
                later -= from_here_on(n_token, b_slope, False, Q)
            db *= tl.exp2(-n_exponent)
        if DECAY > 0:
            scaled = q.to(tl.float32) * scale
            db = own_to_rows(db, own_pairs, scaled, q_token, n_token, R, PRECISION, DTYPE)
            if SEQUENTIAL:
                db = onto(db, tl.trans(of_one_token(g, n_token)), a, PRECISION)
        if TIED:
            db += da
        store_rows(d_write, db, first, length, head, column, N, R, HV, K)
    if L > 0:
        dl = onto(dl, tl.trans(p_lone), q_late, PRECISION)
        if R > 0:
            dl = onto(dl, tl.trans(g_lone), a_late, PRECISION)
        if DECAY == 1:
            sums -= sums_from_here_on(m_token, tl.sum(w.to(tl.float32) * dl, 1), False, Q)
        if DECAY == 2:
            w_slope = w_early.to(tl.float32) * dl
            if L == 1:
                slope -= w_slope
            else:
                later_lone = from_here_on(m_token, w_slope, False, Q)
            dl *= tl.exp2(-m_exponent)
        if DECAY > 0:
            scaled = q.to(tl.float32) * scale
            dl = own_to_rows(dl, lone_own_pairs, scaled, q_token, m_token, L, PRECISION, DTYPE)
        store_rows(d_lone, dl, first, length, head, column, M, L, HV, K)
    if DECAY > 0:
        # A loop of its own: where a tile that is pipelined for a product is looked at as well, Triton lets it be
        # overwritten while the product reads it.
        overlap = tl.zeros([BK], tl.float32)
        for start in range(0, V, BO):
            channel = start + tl.arange(0, BO)
            state = load_state(entry_states + flat * K * V, channel, column, K, V)
            d_state = load_state(exit_gradients + flat * K * V, channel, column, K, V)
            overlap += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    if DECAY == 1:
        ends += overlap * tl.load(total + flat)
        at = (tile.to(tl.int64) * tokens + first + q_token) * HV + head
        tl.store(d_log_decay + at, sums + tl.sum(ends, 0), mask=q_token < length)
    if DECAY == 2:
        ends += overlap * tl.load(total + flat * K + column, mask=column < K, other=0.0)
        sums = sums_from(ones, slope) + ends[None, :]
        if R == 1 and RAW:
            sums -= a_slope
        if R > 1:
            sums += later
        if L > 1:
            sums -= later_lone
        store_rows(d_log_decay, sums, first, length, head, column, Q, 1, HV, K)
