"""The delta rule and the models that choose its step: DeltaNet, Longhorn, EFLA."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.drivers.base import Factor, LowRankDriver, Row


def delta_rule(key: Tensor, value: Tensor, beta: Tensor) -> LowRankDriver:
    """``S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ``.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]``.
    Source: DeltaNet, Yang, Wang, Zhang, Shen and Kim 2024, arXiv 2406.06484.
    """
    return LowRankDriver((Row(read=Factor(key, beta, -1), write=key, value=Factor(value, beta)),))


def longhorn(key: Tensor, value: Tensor, beta: Tensor) -> LowRankDriver:
    """The delta rule with ``β' = β / (1 + β‖k‖²)``: the implicit (backward Euler) step on ``‖Sᵀk - v‖²``.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]`` ≥ 0. The dense form with one β a head; the
    published model keeps only the diagonal of k kᵀ and one β a value channel.
    Source: Liu, Wang, Wu, Feng, Stone and Liu 2024, arXiv 2407.14207.
    """
    return delta_rule(key, value, beta / (1 + beta * _squared_norm(key, beta)))


def efla(key: Tensor, value: Tensor, beta: Tensor) -> LowRankDriver:
    """The delta rule with ``(1 - e^{-β‖k‖²}) / ‖k‖²``: the exact flow of ``dS = β k (v - Sᵀk)ᵀ dt`` over unit time.

    ``key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]``. The limit β is taken where ``β‖k‖²`` vanishes.
    Source: error-free linear attention, Lei et al. 2025, arXiv 2512.12602.
    """
    exponent = beta * _squared_norm(key, beta)
    small = exponent.abs() < 1e-4
    series = 1 - exponent / 2 * (1 - exponent / 3 * (1 - exponent / 4))
    ratio = torch.where(small, series, -torch.expm1(-exponent) / torch.where(small, 1, exponent))
    return delta_rule(key, value, beta * ratio)


def _squared_norm(key: Tensor, beta: Tensor) -> Tensor:
    """``‖k‖²`` with one column a value head, at least float32."""
    dtype = torch.promote_types(torch.promote_types(key.dtype, beta.dtype), torch.float32)
    norm = key.to(dtype).square().sum(-1)
    return norm.repeat_interleave(beta.shape[-1] // norm.shape[-1], -1)
