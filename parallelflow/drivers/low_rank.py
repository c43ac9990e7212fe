"""The paper's driver: R rows a token, of any kind."""

from __future__ import annotations

from torch import Tensor

from parallelflow.drivers.base import Factor, LowRankDriver, Order, Reads, Row


def low_rank_flow(
    value: Tensor,
    log_decay: Tensor | None,
    read: Tensor,
    write: Tensor,
    order: Order = "simultaneous",
    reads: Reads = "decayed",
) -> LowRankDriver:
    """``S ← diag(e^{g_t}) S``, then ``S ← S + Σ_j b_tj (a_tjᵀ S + u_tjᵀ)``, the rows at once or one after another.

    ``read`` (a) and ``write`` (b) ``[B, T, R, H, K]``, ``value`` (u) ``[B, T, R, HV, V]``, ``log_decay`` None,
    ``[B, T, HV]`` or ``[B, T, HV, K]`` (natural, ≤ 0); ``order`` and ``reads`` as ``LowRankDriver`` has them.
    Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492), section 3.
    """
    return LowRankDriver((Row(read=Factor(read), write=write, value=Factor(value)),), log_decay, order, reads)
