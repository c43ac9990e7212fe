"""FLA's generalised delta rules, whose erasing row and writing row are apart: RWKV-7, DPLR, IPLR."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from parallelflow import functional
from parallelflow.compat.fla.call import Mapped, function
from parallelflow.drivers import Factor, LowRankDriver, Row
from parallelflow.integrate import integrate


def _dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gk: Tensor, lower_bound: float | None = None
) -> Mapped:
    """``S_t = (diag(e^{gk_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ``; all but ``v`` ``[B, T, H, K]``.

    ``lower_bound`` and ``safe_gate`` promise FLA's kernels that ``gk`` is bounded; no result depends on them.
    Diagonal plus low rank: ``fla.ops.generalized_delta_rule``.
    """
    if lower_bound is not None and lower_bound >= 0:
        raise ValueError(f"lower_bound: got {lower_bound}, expected a negative number")
    tensors = {"query": q, "key": k, "value": v, "log_decay": gk, "read": a, "write": b}
    return Mapped(functional.rwkv7, tensors)


def _rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, lower_bound: float | None = None
) -> Mapped:
    """``S_t = (diag(e^{w_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ r_t``.

    All but ``v`` are ``[B, T, H, K]``; ``scale`` is 1 in the chunked form and ``K^-½`` in the recurrent one, as in FLA.
    RWKV-7: ``fla.ops.rwkv7``.
    """
    return _dplr(r, k, v, a, b, w, lower_bound)


def _rwkv7_multiplied(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor) -> Mapped:
    """RWKV-7 from its layer's own tensors: reads ``-kk``, writes ``kk ⊙ a``. ``fla.ops.rwkv7``."""
    return _dplr(r, k, v, -kk, kk * a, w)


def _identity_plus_low_rank(
    query: Tensor, key: Tensor, value: Tensor, read: Tensor, write: Tensor, **options: Any
) -> Any:
    rows = (Row(read=Factor(read), write=write), Row(write=key, value=Factor(value)))
    return integrate(LowRankDriver(rows), query, **options)


def _iplr(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Mapped:
    """``S_t = (I + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ``; all but ``v`` ``[B, T, H, K]``.

    Identity plus low rank: ``fla.ops.generalized_delta_rule``.
    """
    return Mapped(_identity_plus_low_rank, {"query": q, "key": k, "value": v, "read": a, "write": b})


chunk_rwkv7 = function("chunk_rwkv7", _rwkv7)
fused_recurrent_rwkv7 = function("fused_recurrent_rwkv7", _rwkv7)
fused_mul_recurrent_rwkv7 = function("fused_mul_recurrent_rwkv7", _rwkv7_multiplied)
chunk_dplr_delta_rule = function("chunk_dplr_delta_rule", _dplr)
fused_recurrent_dplr_delta_rule = function("fused_recurrent_dplr_delta_rule", _dplr)
chunk_iplr_delta_rule = function("chunk_iplr_delta_rule", _iplr)
fused_recurrent_iplr_delta_rule = function("fused_recurrent_iplr_delta_rule", _iplr)
