"""Rows that only write: linear attention and its decayed forms."""

from __future__ import annotations

from torch import Tensor

from parallelflow.checks import expect_floating, expect_rank, expect_tensor
from parallelflow.drivers.base import Factor, LowRankDriver, Row


def linear_attention(key: Tensor, value: Tensor) -> LowRankDriver:
    """``S_t = S_{t-1} + k_t v_tᵀ``.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``.
    Source: Katharopoulos, Vyas, Pappas and Fleuret 2020, arXiv 2006.16236.
    """
    return LowRankDriver((Row(write=key, value=Factor(value)),))


def retention(key: Tensor, value: Tensor, log_decay: Tensor) -> LowRankDriver:
    """``S_t = e^{g_h} S_{t-1} + k_t v_tᵀ``, one fixed decay a head.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``, ``log_decay [HV]`` (natural, ≤ 0).
    Source: RetNet, Sun et al. 2023, arXiv 2307.08621.
    """
    expect_floating("log_decay", log_decay)
    expect_rank("log_decay", log_decay, "[HV], one value per head", 1)
    expect_tensor("value", value)
    return ssd(key, value, log_decay.expand(*value.shape[:2], -1))


def lightning_attention(key: Tensor, value: Tensor, log_decay: Tensor) -> LowRankDriver:
    """``S_t = e^{g_h} S_{t-1} + k_t v_tᵀ``: retention's recurrence, with the slopes of Lightning Attention.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``, ``log_decay [HV]`` (natural, ≤ 0).
    Source: Qin et al. 2024, arXiv 2401.04658.
    """
    return retention(key, value, log_decay)


def ssd(key: Tensor, value: Tensor, log_decay: Tensor) -> LowRankDriver:
    """``S_t = e^{g_t} S_{t-1} + k_t v_tᵀ`` (k is Mamba-2's B, v is dt·x, g is dt·A, the query is C).

    ``key [B, T, H, K]``, ``value [B, T, HV, V]`` already multiplied by dt, ``log_decay [B, T, HV]`` (natural, ≤ 0).
    Source: Mamba-2, Dao and Gu 2024, arXiv 2405.21060.
    """
    return LowRankDriver((Row(write=key, value=Factor(value)),), log_decay)


def gated_linear_attention(key: Tensor, value: Tensor, log_decay: Tensor) -> LowRankDriver:
    """``S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ``.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``, ``log_decay [B, T, HV, K]`` (natural, ≤ 0).
    Source: GLA, Yang, Wang, Shen, Panda and Kim 2024, arXiv 2312.06635; HGRN-2, Qin et al. 2024, arXiv 2404.07904.
    """
    return LowRankDriver((Row(write=key, value=Factor(value)),), log_decay)
