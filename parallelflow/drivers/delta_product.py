"""Several Householder steps a token."""

from __future__ import annotations

from torch import Tensor

from parallelflow.drivers.base import Factor, LowRankDriver, Row


def delta_product(key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> LowRankDriver:
    """``S ← e^{g_t} S``, then for j = 1 … R:  ``S ← (I - β_tj k_tj k_tjᵀ) S + β_tj k_tj v_tjᵀ``.

    ``key [B, T, R, H, K]``, ``value [B, T, R, HV, V]``, ``beta [B, T, R, HV]``, ``log_decay [B, T, HV]`` (natural, ≤ 0)
    or None.
    Source: DeltaProduct, Siems, Carstensen, Zela, Hutter, Pontil and Grazzi 2025, arXiv 2502.10297.
    """
    row = Row(read=Factor(key, beta, -1), write=key, value=Factor(value, beta))
    return LowRankDriver((row,), log_decay, order="sequential")
