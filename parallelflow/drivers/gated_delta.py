"""The delta rule on a decayed state: Gated DeltaNet, its channel-wise successors, and Comba."""

from __future__ import annotations

from torch import Tensor

from parallelflow.drivers.base import Factor, LowRankDriver, Row


def gated_delta_rule(key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor) -> LowRankDriver:
    """``S_t = (I - β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ``.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]``, ``log_decay [B, T, HV]`` (natural, ≤ 0).
    Source: Gated DeltaNet, Yang, Kautz and Hatamizadeh 2025, arXiv 2412.06464.
    """
    return LowRankDriver((Row(read=Factor(key, beta, -1), write=key, value=Factor(value, beta)),), log_decay)


def kimi_delta_attention(key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor) -> LowRankDriver:
    """``S_t = (I - β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ``.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]``, ``log_decay [B, T, HV, K]`` (natural, ≤ 0).
    Source: Kimi Linear, Kimi Team 2025, arXiv 2510.26692.
    """
    return gated_delta_rule(key, value, beta, log_decay)


def gated_delta_rule_2(key: Tensor, value: Tensor, erase: Tensor, write: Tensor, log_decay: Tensor) -> LowRankDriver:
    """``S_t = (I - k_t (b_t ⊙ k_t)ᵀ) diag(e^{g_t}) S_{t-1} + k_t (w_t ⊙ v_t)ᵀ``: β apart for erasing and for writing.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``, ``erase`` (b) ``[B, T, HV, K]``, ``write`` (w) ``[B, T, HV, V]``,
    ``log_decay [B, T, HV, K]`` (natural, ≤ 0).
    Source: Gated DeltaNet-2, as implemented in flash-linear-attention 0.6.0 (``gdn2``).
    """
    return LowRankDriver((Row(read=Factor(key, erase, -1), write=key, value=Factor(value, write)),), log_decay)


def comba(key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, removal_key: Tensor) -> LowRankDriver:
    """``S_t = e^{g_t} S_{t-1} - β_t k_t p_tᵀ S_{t-1} + β_t k_t v_tᵀ``: the removal reads the state before its decay.

    ``key``, ``removal_key`` (p) ``[B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]``,
    ``log_decay [B, T, HV]`` (natural, ≤ 0).
    Source: Comba, Hu, Pan et al. 2025, arXiv 2506.02475, as its published kernels compute it.
    """
    row = Row(read=Factor(removal_key, beta, -1), write=key, value=Factor(value, beta))
    return LowRankDriver((row,), log_decay, reads="raw")
