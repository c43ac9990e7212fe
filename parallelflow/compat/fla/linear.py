"""FLA's families whose rows only write: linear attention, retention, lightning attention, GLA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallelflow import functional
from parallelflow.compat.fla.call import Mapped, function
from parallelflow.compat.fla.columns import by_columns, flat, repeated


def _linear_attn(q: Tensor, k: Tensor, v: Tensor, normalize: bool = False) -> Mapped:
    """``S_t = S_{t-1} + k_t v_tᵀ``; with ``normalize`` (the chunked form's default) ``o_t = n_t / (d_t + 1e-10)`` with
    ``n_t = scale · S_tᵀ q_t``, ``d_t = scale · z_tᵀ q_t``, ``z_t = Σ_{s≤t} k_s``.

    Normalised, a state is a pair: S (None unless ``output_final_state``) and z ``[N, 1, H, K]``, which always comes;
    the initial state is such a pair, or S alone. ``fla.ops.linear_attn``.
    """
    if not normalize:
        return Mapped(functional.linear_attention, {"query": q, "key": k, "value": v})
    wide = torch.promote_types(v.dtype, torch.float32)  # the quotient is rounded once, at the end
    tensors = {"query": q.to(wide), "key": k.to(wide), "value": pad(v.to(wide), (0, 1), value=1.0)}

    def enter(state: Any) -> Tensor | None:
        matrix, keys = state if isinstance(state, tuple) else (state, None)
        shape = [v.shape[2], q.shape[-1], v.shape[-1]]
        for part, expected in ((matrix, ["N", *shape]), (keys, ["N", 1, *shape[:2]])):
            if part is not None and (not isinstance(part, Tensor) or list(part.shape[1:]) != expected[1:]):
                found = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"initial_state: got {found}, expected a tensor {expected}".replace("'N'", "N"))
        if matrix is None and keys is None:
            return None
        if keys is None:
            return pad(matrix.to(wide), (0, 1))
        column = keys.to(wide).squeeze(1).unsqueeze(-1)
        if matrix is None:
            matrix = column.new_zeros(*column.shape[:-1], v.shape[-1])
        return torch.cat([matrix.to(wide), column], -1)

    def leave(output: Tensor, state: Tensor, wanted: bool) -> tuple[Tensor, Any]:
        quotient = output[..., :-1] / (output[..., -1:] + 1e-10)
        matrix = state[..., :-1].contiguous() if wanted else None
        return quotient.to(v.dtype), (matrix, state[..., -1].unsqueeze(1).contiguous())

    return Mapped(functional.linear_attention, tensors, enter, leave)


def _simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None) -> Mapped:
    """``S_t = e^{g_t + γ} S_{t-1} + k_t v_tᵀ``; ``g [B, T, H]``, ``g_gamma`` (γ) ``[H]``, either may be None.

    ``fla.ops.simple_gla``.
    """
    tensors = {"query": q, "key": k, "value": v}
    if g is None and g_gamma is None:
        return Mapped(functional.linear_attention, tensors)
    if g is None:
        assert g_gamma is not None
        return Mapped(functional.retention, {**tensors, "log_decay": g_gamma})
    return Mapped(functional.ssd, {**tensors, "log_decay": g if g_gamma is None else g + g_gamma})


def _retention(q: Tensor, k: Tensor, v: Tensor) -> Mapped:
    """``S_t = γ_h S_{t-1} + k_t v_tᵀ`` with ``γ_h = 1 - 2^(-5 - h)`` for head h. ``fla.ops.retention``."""
    exponents = -5 - torch.arange(q.shape[2], dtype=torch.float64, device=q.device)
    return _simple_gla(q, k, v, g_gamma=_wide(torch.log1p(-torch.exp2(exponents)), v))


def _lightning_attn(q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int) -> Mapped:
    """``S_t = e^{γ_h} S_{t-1} + k_t v_tᵀ`` with ``γ_h = -8 h / H · (1 - layer_idx / num_layers)`` for head h.

    ``fla.ops.lightning_attn``.
    """
    heads = torch.arange(q.shape[2], dtype=torch.float64, device=q.device)
    return _simple_gla(q, k, v, g_gamma=_wide(-8 / q.shape[2] * (1 - layer_idx / num_layers) * heads, v))


def _wide(decay: Tensor, v: Tensor) -> Tensor:
    return decay.to(torch.promote_types(v.dtype, torch.float32))


def _gla(q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None = None, gv: Tensor | None = None) -> Mapped:
    """``S_t = diag(e^{gk_t}) S_{t-1} diag(e^{gv_t}) + k_t v_tᵀ``; ``gk [B, T, H, K]``, ``gv [B, T, H, V]``, or None.

    ``fla.ops.gla``.
    """
    columns = v.shape[-1]
    tensors = {"query": q, "key": k, "value": v}
    if gv is None:
        if gk is None:
            return Mapped(functional.linear_attention, tensors)
        return Mapped(functional.gated_linear_attention, {**tensors, "log_decay": gk})
    if gk is None:
        return by_columns(Mapped(functional.ssd, {**tensors, "log_decay": flat("gv", gv, v)}))
    decay = repeated(gk, columns) + flat("gv", gv, v).unsqueeze(-1)
    return by_columns(Mapped(functional.gated_linear_attention, {**tensors, "log_decay": decay}))


def _chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Mapped:
    """``S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ``; ``g [B, T, H, K]``. ``fla.ops.gla``."""
    return _gla(q, k, v, g)


chunk_linear_attn = function("chunk_linear_attn", _linear_attn)
fused_chunk_linear_attn = function("fused_chunk_linear_attn", _linear_attn)
fused_recurrent_linear_attn = function("fused_recurrent_linear_attn", _linear_attn)
chunk_simple_gla = function("chunk_simple_gla", _simple_gla)
fused_chunk_simple_gla = function("fused_chunk_simple_gla", _simple_gla)
fused_recurrent_simple_gla = function("fused_recurrent_simple_gla", _simple_gla)
chunk_retention = function("chunk_retention", _retention)
fused_chunk_retention = function("fused_chunk_retention", _retention)
fused_recurrent_retention = function("fused_recurrent_retention", _retention)
chunk_lightning_attn = function("chunk_lightning_attn", _lightning_attn)
fused_recurrent_lightning_attn = function("fused_recurrent_lightning_attn", _lightning_attn)
chunk_gla = function("chunk_gla", _chunk_gla)
fused_recurrent_gla = function("fused_recurrent_gla", _gla)
