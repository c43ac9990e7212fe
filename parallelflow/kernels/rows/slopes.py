"""Device functions of the gradients: what comes through pairs, and sums over later tokens."""

import triton
import triton.language as tl

from parallelflow.kernels.rows.factors import in_three, load_rows, store_rows, weighted


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
def of_others(pairs, token):
    """Pairs of rows of one family, of different tokens alone."""
    return meets(pairs, token[:, None] != token[None, :])


@triton.jit
def of_one_token(pairs, token):
    return meets(pairs, token[:, None] == token[None, :])


@triton.jit
def from_here_on(token, rows, STRICT: tl.constexpr, Q: tl.constexpr):
    """Sums of rows over all later tokens, and the own one unless STRICT: [rows, columns] -> [Q, columns]."""
    here = tl.arange(0, Q)[:, None]
    later = token[None, :] > here if STRICT else token[None, :] >= here
    return weighted(tl.where(later, 1.0, 0.0), in_three(rows))


@triton.jit
def own_and_later(rows, room, first, length, head, column, Q: tl.constexpr, HV: tl.constexpr, K: tl.constexpr):
    """Sums of rows that lie like the queries over each token and all later ones. They go through ``room``, where the
    result will lie: in the layout of a load a running sum takes few registers, in that of a product very many."""
    store_rows(room, rows, first, length, head, column, Q, 1, HV, K)
    tl.debug_barrier()
    sums = tl.cumsum(load_rows(room, first, length, head, column, Q, 1, HV, HV, K), 0, reverse=True)
    tl.debug_barrier()
    return sums


@triton.jit
def sums_from_here_on(token, values, STRICT: tl.constexpr, Q: tl.constexpr):
    """The same of one number a row."""
    here = tl.arange(0, Q)[:, None]
    later = token[None, :] > here if STRICT else token[None, :] >= here
    return tl.sum(tl.where(later, values[None, :], 0.0), 1)


@triton.jit
def load_own(base, flat, ROWS: tl.constexpr):
    """Of each row the pair with its token's query."""
    return tl.load(base + flat * ROWS + tl.arange(0, ROWS))


@triton.jit
def own_to_queries(sums, own, rows, q_token, token, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    """``sums`` of queries and what comes through pairs of one token, ``own`` for each of ``rows``, COUNT a token."""
    if COUNT == 1:
        sums += own[:, None] * rows
    else:
        pairs = tl.where(q_token[:, None] == token[None, :], own[None, :], 0.0)
        sums = onto(sums, pairs.to(rows.dtype), rows, PRECISION)
    return sums


@triton.jit
def own_to_rows(sums, own, queries, q_token, token, COUNT: tl.constexpr, PRECISION: tl.constexpr,
                DTYPE: tl.constexpr):  # fmt: skip
    """``sums`` of rows, COUNT a token, and what comes through the pairs ``own`` with the queries of their tokens."""
    if COUNT == 1:
        sums += own[:, None] * queries
    else:
        pairs = tl.where(token[:, None] == q_token[None, :], own[:, None], 0.0)
        sums = onto(sums, pairs.to(DTYPE), queries, PRECISION)
    return sums
