"""RWKV-7: a diagonal plus a low-rank transition on the raw state."""

from __future__ import annotations

from torch import Tensor

from parallelflow.drivers.base import Factor, LowRankDriver, Row


def rwkv7(key: Tensor, value: Tensor, log_decay: Tensor, read: Tensor, write: Tensor) -> LowRankDriver:
    """``S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ``.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``, ``log_decay [B, T, HV, K]`` (natural, ≤ 0), ``read`` (a) and
    ``write`` (b) ``[B, T, HV, K]``.
    Source: RWKV-7, Peng et al. 2025, arXiv 2503.14456.
    """
    rows = (Row(read=Factor(read), write=write), Row(write=key, value=Factor(value)))
    return LowRankDriver(rows, log_decay, reads="raw")
