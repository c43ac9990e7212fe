"""Gradients of the rows and of the decay (pull.py has the formulas), readers first, then writers.

No decay, one a head, or one a channel where the whole chunk may be centred (factors.py). A chunk whose decays are
stronger is left to ``pull_strong.py``.
"""

import triton
import triton.language as tl

from parallelflow.kernels.chunks import locate_chunk
from parallelflow.kernels.gradient import load_state
from parallelflow.kernels.rows.factors import (
    from_middle,
    in_three,
    load_channel_decays,
    load_factor,
    load_rows,
    load_weights,
    places,
    store_rows,
    to_end,
    token_sums,
)
from parallelflow.kernels.rows.layout import WHOLE
from parallelflow.kernels.rows.slopes import (
    from_here_on,
    load_pairs,
    meets,
    onto,
    own_and_later,
    sums_from_here_on,
    through_own,
)

WHOLE_CHUNK = tl.constexpr(WHOLE)


@triton.jit(do_not_specialize=["time", "per_sequence", "tokens"])
def pull_kernel(query, read, read_coefficient, write, lone_write, log_decay, solution, given, d_source, d_output,
                entry_states, exit_gradients, total, floors, gram, scores, lone_gram, lone_scores,
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
    """Gradients of one tile of BK key channels; of a scalar decay and of a tied coefficient that tile's part."""
    tile = tl.program_id(0) % TILES
    flat = (tl.program_id(0) // TILES).to(tl.int64)
    if DECAY == 2:  # noqa: SIM102 - settled while compiling
        if tl.load(floors + flat) != WHOLE_CHUNK:
            return
    head = flat % HV
    first, length = locate_chunk(flat // HV, table, time, per_sequence, C, PACKED)
    column = tile * BK + tl.arange(0, BK)
    DTYPE: tl.constexpr = query.dtype.element_ty
    q_token, q_place = places(Q, 1)
    n_token, n_place = places(N if R > 0 else Q, R if R > 0 else 1)
    m_token, m_place = places(M if L > 0 else Q, L if L > 0 else 1)
    # Vector decays: all in units of the chunk's middle until it is summed; what meets the states differs by ``half``.
    if DECAY == 1:
        q_high, q_low, end = token_sums(log_decay, first, length, head, Q, 1, False, HV)
    if DECAY == 2:
        decays = load_channel_decays(log_decay, first, length, head, column, Q, HV, K)
        half = tl.exp2(0.5 * tl.sum(decays, 0))[None, :]
        decays = in_three(decays)
        q_exponent = from_middle(decays, q_token, LEVELS, False)
        n_exponent, m_exponent = q_exponent, q_exponent
        if R > 1:
            n_exponent = from_middle(decays, n_token, LEVELS, False)
        if L > 1:
            m_exponent = from_middle(decays, m_token, LEVELS, False)
    # readers, through the states
    dq = tl.zeros([Q, BK], tl.float32)
    if R > 0:
        da = tl.zeros([N, BK], tl.float32)
    for start in range(0, V, BV):
        channel = start + tl.arange(0, BV)
        state = load_state(entry_states + flat * K * V, channel, column, K, V)
        do = load_rows(d_output, first, length, head, channel, Q, 1, HV, HV, V)
        dq = onto(dq, do, state, PRECISION)
        if R > 0:
            du = load_rows(d_source, first, length, head, channel, N, R, HV, HV, V)
            da = onto(da, du, state, PRECISION)
    if DECAY == 1:
        dq *= tl.exp2(q_high)[:, None]
        if R > 0:
            a_high, a_low, end = token_sums(log_decay, first, length, head, N, R, RAW, HV)
            da *= tl.exp2(a_high)[:, None]
    if DECAY == 2:
        dq *= half
        if R > 0:
            da *= half
    # and through the pairs of different tokens
    if R > 0:
        b = load_rows(write, first, length, head, column, N, R, HV, WRITE_HEADS, K)
        early = b
        if DECAY == 2:
            early = (b * tl.exp2(-n_exponent)).to(DTYPE)
        pairs = meets(load_pairs(scores, flat, Q, N), q_token[:, None] != n_token[None, :])
        dq = onto(dq, pairs, early, PRECISION)
        pairs = load_pairs(gram, flat, N, N)
        if SEQUENTIAL:
            pairs = meets(pairs, n_token[:, None] != n_token[None, :])
        da = onto(da, pairs, early, PRECISION)
    if L > 0:
        w = load_rows(lone_write, first, length, head, column, M, L, HV, LONE_HEADS, K)
        early = w
        if DECAY == 2:
            early = (w * tl.exp2(-m_exponent)).to(DTYPE)
        pairs = meets(load_pairs(lone_scores, flat, Q, M), q_token[:, None] != m_token[None, :])
        dq = onto(dq, pairs, early, PRECISION)
        if R > 0:
            da = onto(da, load_pairs(lone_gram, flat, N, M), early, PRECISION)
    q = load_rows(query, first, length, head, column, Q, 1, HV, H, K).to(tl.float32) * scale
    q_late = q
    if R > 0:
        a = load_factor(read, read_coefficient, first, length, head, column, N, R, HV, READ_HEADS, READ_KIND,
                        READ_COEFFICIENT_HEADS, READ_SIGN, K)  # fmt: skip
        a_late = a
    if DECAY == 2:
        q_late = (q * tl.exp2(q_exponent)).to(DTYPE)
        slope = q_late.to(tl.float32) * dq
        dq *= tl.exp2(q_exponent)
        if R > 0:
            a_exponent = from_middle(decays, n_token, LEVELS, True) if RAW else n_exponent
            a_late = (a * tl.exp2(a_exponent)).to(DTYPE)
            a_slope = a_late.to(tl.float32) * da
            if R == 1:  # rows that lie like the queries join them
                slope += a_slope
            else:
                later = from_here_on(n_token, a_slope, RAW, Q)
            da *= tl.exp2(a_exponent)
    if DECAY == 1:
        sums = sums_from_here_on(q_token, tl.sum(q * dq, 1), False, Q)
        if R > 0:
            sums += sums_from_here_on(n_token, tl.sum(a * da, 1), RAW, Q)
    # Decays do not come between pairs of one token: those are added last, for in the decays' gradients they would
    # cancel, and leave their rounding.
    if R > 0:
        dq = through_own(dq, load_pairs(scores, flat, Q, N), b, q_token, n_token, R, PRECISION)
        if SEQUENTIAL:
            da = through_own(da, load_pairs(gram, flat, N, N), b, n_token, n_token, R, PRECISION)
        if not TIED:
            store_rows(d_read, da, first, length, head, column, N, R, HV, K)
    if L > 0:
        dq = through_own(dq, load_pairs(lone_scores, flat, Q, M), w, q_token, m_token, L, PRECISION)
    store_rows(d_query, dq * scale, first, length, head, column, Q, 1, HV, K)
    # writers, through the states
    if R > 0:
        db = tl.zeros([N, BK], tl.float32)
    if L > 0:
        dl = tl.zeros([M, BK], tl.float32)
    overlap = tl.zeros([BK], tl.float32)
    for start in range(0, V, BV):
        channel = start + tl.arange(0, BV)
        d_state = load_state(exit_gradients + flat * K * V, channel, column, K, V)
        if R > 0:
            x = load_rows(solution, first, length, head, channel, N, R, HV, HV, V)
            db = onto(db, x, d_state, PRECISION)
        if L > 0:
            u = load_rows(given, first, length, head, channel, M, L, HV, GIVEN_HEADS, V)
            dl = onto(dl, u, d_state, PRECISION)
        if DECAY > 0:
            state = load_state(entry_states + flat * K * V, channel, column, K, V)
            overlap += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    if DECAY == 1:
        ends = overlap * tl.load(total + flat)
    if DECAY == 2:
        ends = overlap * tl.load(total + flat * K + column, mask=column < K, other=0.0)
    if R > 0:
        if DECAY == 1:
            b_high, b_low, end = token_sums(log_decay, first, length, head, N, R, False, HV)
            db *= to_end(end, b_high, b_low)[:, None]
            ends += tl.sum(b.to(tl.float32) * db, 0)
        if DECAY == 2:
            early = (b * tl.exp2(-n_exponent)).to(DTYPE)
            db *= half
            ends += tl.sum(early.to(tl.float32) * db, 0)
        # and through the pairs of different tokens
        pairs = meets(load_pairs(scores, flat, Q, N), q_token[:, None] != n_token[None, :])
        db = onto(db, tl.trans(pairs), q_late, PRECISION)
        pairs = load_pairs(gram, flat, N, N)
        if SEQUENTIAL:
            pairs = meets(pairs, n_token[:, None] != n_token[None, :])
        db = onto(db, tl.trans(pairs), a_late, PRECISION)
        if DECAY == 1:
            sums -= sums_from_here_on(n_token, tl.sum(b.to(tl.float32) * db, 1), False, Q)
        if DECAY == 2:
            b_slope = early.to(tl.float32) * db
            if R == 1:
                slope -= b_slope
            else:
                later -= from_here_on(n_token, b_slope, False, Q)
            db *= tl.exp2(-n_exponent)
        db = through_own(db, tl.trans(load_pairs(scores, flat, Q, N)), q, n_token, q_token, R, PRECISION)
        if SEQUENTIAL:
            db = through_own(db, tl.trans(load_pairs(gram, flat, N, N)), a, n_token, n_token, R, PRECISION)
        if TIED:
            at = ((tile.to(tl.int64) * tokens + first + n_token) * R + n_place) * HV + head
            inside = (n_token < length) & (n_place < R)
            tl.store(d_read_coefficient + at, READ_SIGN * tl.sum(b.to(tl.float32) * da, 1), mask=inside)
            weight = load_weights(read_coefficient, first, length, head, N, R, HV, READ_COEFFICIENT_HEADS)
            db += READ_SIGN * weight[:, None] * da
        store_rows(d_write, db, first, length, head, column, N, R, HV, K)
    if L > 0:
        if DECAY == 1:
            l_high, l_low, end = token_sums(log_decay, first, length, head, M, L, False, HV)
            dl *= to_end(end, l_high, l_low)[:, None]
            ends += tl.sum(w.to(tl.float32) * dl, 0)
        if DECAY == 2:
            early = (w * tl.exp2(-m_exponent)).to(DTYPE)
            dl *= half
            ends += tl.sum(early.to(tl.float32) * dl, 0)
        pairs = meets(load_pairs(lone_scores, flat, Q, M), q_token[:, None] != m_token[None, :])
        dl = onto(dl, tl.trans(pairs), q_late, PRECISION)
        if R > 0:
            dl = onto(dl, tl.trans(load_pairs(lone_gram, flat, N, M)), a_late, PRECISION)
        if DECAY == 1:
            sums -= sums_from_here_on(m_token, tl.sum(w.to(tl.float32) * dl, 1), False, Q)
        if DECAY == 2:
            w_slope = early.to(tl.float32) * dl
            if L == 1:
                slope -= w_slope
            else:
                later_lone = from_here_on(m_token, w_slope, False, Q)
            dl *= tl.exp2(-m_exponent)
        dl = through_own(dl, tl.trans(load_pairs(lone_scores, flat, Q, M)), q, m_token, q_token, L, PRECISION)
        store_rows(d_lone, dl, first, length, head, column, M, L, HV, K)
    if DECAY == 1:
        at = (tile.to(tl.int64) * tokens + first + q_token) * HV + head
        tl.store(d_log_decay + at, sums + tl.sum(ends, 0), mask=q_token < length)
    if DECAY == 2:
        sums = own_and_later(slope, d_log_decay, first, length, head, column, Q, HV, K) + ends[None, :]
        if R == 1 and RAW:
            sums -= a_slope
        if R > 1:
            sums += later
        if L > 1:
            sums -= later_lone
        store_rows(d_log_decay, sums, first, length, head, column, Q, 1, HV, K)
