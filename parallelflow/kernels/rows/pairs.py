"""Gradients of the Gram matrices, of all chunks at once, with the decay between two tokens where it is no matter of the
channel:

    d_gram = dU X^T,   d_scores = dO X^T,   d_lone_gram = dU u^T,   d_lone_scores = dO u^T,

each where its matrix is not zero by construction; or of those chunks alone whose decays are too strong to be centred,
where who pulls the others back forms these himself. Where decays come between tokens, the pairs of a row and the query
of its own token, to which none comes, are kept apart (``own``, ``lone_own``).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallelflow.kernels.chunks import Chunks, locate_chunk
from parallelflow.kernels.launch import bind
from parallelflow.kernels.prepare import decay_between
from parallelflow.kernels.products import float32_precision
from parallelflow.kernels.rows.factors import load_rows, places, token_sums
from parallelflow.kernels.rows.layout import NO_DECAY, WHOLE, Layout, heads_of, width_of
from parallelflow.kernels.rows.prepare import sizes

WHOLE_CHUNK = tl.constexpr(WHOLE)


class Pairs(NamedTuple):
    """Of each chunk and value head, in the inputs' dtype, ``own`` and ``lone_own`` (``[N]`` and ``[M]``) in float32;
    None where there is no such pair."""

    gram: Tensor | None
    scores: Tensor | None
    lone_gram: Tensor | None
    lone_scores: Tensor | None
    own: Tensor | None
    lone_own: Tensor | None


@triton.jit
def store_pairs(base, flat, pairs, keep, late_high, late_low, early_high, early_low, DECAY: tl.constexpr):
    """Pairs where ``keep``, times the decay between their tokens if that is a scalar."""
    ROWS: tl.constexpr = pairs.shape[0]
    COLUMNS: tl.constexpr = pairs.shape[1]
    if DECAY == 1:
        pairs *= decay_between(late_high[:, None], late_low[:, None], early_high[None, :], early_low[None, :], keep)
    else:
        pairs = tl.where(keep, pairs, 0.0)
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(base + flat * (ROWS * COLUMNS) + at, pairs.to(base.dtype.element_ty))


@triton.jit
def store_own(base, flat, pairs, late, early):
    """Of each early row the pair with the one late row of its token."""
    own = tl.sum(tl.where(late[:, None] == early[None, :], pairs, 0.0), 0)
    tl.store(base + flat * early.shape[0] + tl.arange(0, early.shape[0]), own)


@triton.jit(do_not_specialize=["time", "per_sequence"])
def pairs_kernel(solution, given, d_source, d_output, log_decay, floors, gram, scores, lone_gram, lone_scores, own,
                 lone_own,
                 table, time, per_sequence,
                 C: tl.constexpr, R: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
                 M: tl.constexpr, Q: tl.constexpr,
                 HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, GIVEN_HEADS: tl.constexpr, DECAY: tl.constexpr,
                 RAW: tl.constexpr, SEQUENTIAL: tl.constexpr, PACKED: tl.constexpr, STRONG: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """All pairs of one chunk and value head; STRONG: unless it may be centred as a whole."""
    flat = tl.program_id(0).to(tl.int64)
    if STRONG:  # noqa: SIM102 - settled while compiling
        if tl.load(floors + flat) == WHOLE_CHUNK:
            return
    head = flat % HV
    first, length = locate_chunk(flat // HV, table, time, per_sequence, C, PACKED)
    if R > 0:
        g = tl.zeros([N, N], tl.float32)
        p = tl.zeros([Q, N], tl.float32)
    if L > 0:
        p_lone = tl.zeros([Q, M], tl.float32)
        if R > 0:
            g_lone = tl.zeros([N, M], tl.float32)
    for start in range(0, V, BV):
        channel = start + tl.arange(0, BV)
        do = load_rows(d_output, first, length, head, channel, Q, 1, HV, HV, V)
        if R > 0:
            du = load_rows(d_source, first, length, head, channel, N, R, HV, HV, V)
            x = tl.trans(load_rows(solution, first, length, head, channel, N, R, HV, HV, V))
            g = tl.dot(du, x, g, input_precision=PRECISION)
            p = tl.dot(do, x, p, input_precision=PRECISION)
        if L > 0:
            u = tl.trans(load_rows(given, first, length, head, channel, M, L, HV, GIVEN_HEADS, V))
            p_lone = tl.dot(do, u, p_lone, input_precision=PRECISION)
            if R > 0:
                g_lone = tl.dot(du, u, g_lone, input_precision=PRECISION)
    q_token, q_place = places(Q, 1)
    q_high = tl.zeros([Q], tl.float32)
    q_low = q_high
    if DECAY == 1:
        q_high, q_low, end = token_sums(log_decay, first, length, head, Q, 1, False, HV)
    if R > 0:
        n_token, n_place = places(N, R)
        a_high = tl.zeros([N], tl.float32)
        a_low = a_high
        b_high = a_high
        b_low = a_high
        if DECAY == 1:
            a_high, a_low, end = token_sums(log_decay, first, length, head, N, R, RAW, HV)
            b_high, b_low, end = token_sums(log_decay, first, length, head, N, R, False, HV)
        before = n_token[:, None] > n_token[None, :]
        if SEQUENTIAL:
            before = before | ((n_token[:, None] == n_token[None, :]) & (n_place[:, None] > n_place[None, :]))
        store_pairs(gram, flat, g, before, a_high, a_low, b_high, b_low, DECAY)
        since = q_token[:, None] >= n_token[None, :]
        if DECAY > 0:
            store_own(own, flat, p, q_token, n_token)
            since = q_token[:, None] > n_token[None, :]
        store_pairs(scores, flat, p, since, q_high, q_low, b_high, b_low, DECAY)
    if L > 0:
        m_token, m_place = places(M, L)
        l_high = tl.zeros([M], tl.float32)
        l_low = l_high
        if DECAY == 1:
            l_high, l_low, end = token_sums(log_decay, first, length, head, M, L, False, HV)
        since = q_token[:, None] >= m_token[None, :]
        if DECAY > 0:
            store_own(lone_own, flat, p_lone, q_token, m_token)
            since = q_token[:, None] > m_token[None, :]
        store_pairs(lone_scores, flat, p_lone, since, q_high, q_low, l_high, l_low, DECAY)
        if R > 0:
            before = n_token[:, None] > m_token[None, :]
            store_pairs(lone_gram, flat, g_lone, before, a_high, a_low, l_high, l_low, DECAY)


def pairs(solution: Tensor | None, given: Tensor | None, d_source: Tensor | None, d_output: Tensor,
          log_decay: Tensor | None, floors: Tensor | None, layout: Layout, chunks: Chunks, *,
          strong_alone: bool) -> Pairs:  # fmt: skip
    """The gradients above, for contiguous arrays in the token's layout."""
    if strong_alone and floors is None:
        return Pairs(None, None, None, None, None, None)
    count, R, L = chunks.count * layout.value_heads, layout.R, layout.L

    def vacant(rows: int, columns: int, there: bool) -> Tensor | None:
        return d_output.new_empty(count, rows, columns) if there else None

    found = Pairs(
        vacant(layout.N, layout.N, R > 0), vacant(layout.Q, layout.N, R > 0),
        vacant(layout.N, layout.M, R > 0 and L > 0), vacant(layout.Q, layout.M, L > 0),
        *(d_output.new_empty(count, rows, dtype=torch.float32) if rows and layout.decay != NO_DECAY else None
          for rows in (layout.N, layout.M)),
    )  # fmt: skip
    if count:
        launch = bind(
            pairs_kernel, **sizes(layout), HV=layout.value_heads, V=layout.V,
            BV=width_of(layout.V, 32),
            GIVEN_HEADS=heads_of(given), DECAY=layout.decay, RAW=layout.raw,
            SEQUENTIAL=layout.sequential, PACKED=chunks.packed, STRONG=strong_alone,
            PRECISION=float32_precision(d_output.device),
            num_warps=4, num_stages=1)  # fmt: skip
        launch(count, solution, given, d_source, d_output, log_decay, floors, *found, chunks.table, chunks.time,
               chunks.per_sequence)  # fmt: skip
    return found
