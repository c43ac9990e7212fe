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
def through_own(sums, pairs, rows, to, of, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    """``sums`` and what comes from ``rows`` of the same token, each row's of ``to``, of ``of``; COUNT: rows
    a token of the family that may have several."""
    own = meets(pairs, to[:, None] == of[None, :])
    if COUNT == 1:
        sums += tl.sum(own.to(tl.float32), 1)[:, None] * rows
    else:
        sums = onto(sums, own, rows, PRECISION)
    return sums
