"""FLA's delta-rule families: one row a token that erases and writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from parallelflow import functional
from parallelflow.compat.fla.call import Mapped, function
from parallelflow.compat.fla.columns import by_columns, flat, repeated
from parallelflow.compat.fla.gates import beta_of, log_decay


def _erase_and_write(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decays: dict[str, Tensor | None]) -> Mapped:
    """The delta rule with the decays there are: ``g`` a head, ``gk`` a key channel, ``gv`` a value channel."""
    g, gk, gv = (decays.get(name) for name in ("g", "gk", "gv"))
    columns = v.shape[-1]
    apart = gv is not None or beta.ndim == 4  # the columns of a head differ
    if apart:
        g, gk = (None if decay is None else repeated(decay, columns) for decay in (g, gk))
        beta = flat("beta", beta, v) if beta.ndim == 4 else repeated(beta, columns)
        if gv is not None:
            g = flat("gv", gv, v) if g is None else g + flat("gv", gv, v)
    tensors: dict[str, Tensor] = {"query": q, "key": k, "value": v, "beta": beta}
    model: Any = functional.delta_rule
    if gk is not None:
        model = functional.kimi_delta_attention
        tensors["log_decay"] = gk if g is None else gk + g.unsqueeze(-1)
    elif g is not None:
        model = functional.gated_delta_rule
        tensors["log_decay"] = g
    mapped = Mapped(model, tensors)
    return by_columns(mapped) if apart else mapped


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None) -> Mapped:
    """``S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ``; ``beta [B, T, H]``, in the recurrent form also
    ``[B, T, H, V]``. DeltaNet: ``fla.ops.delta_rule``.
    """
    return _erase_and_write(q, k, v, beta_of(beta, v, False, False), {})


def _gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
) -> Mapped:
    """``S_t = (I - β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ``; ``g``, ``beta`` ``[B, T, HV]``.

    The recurrent form also takes decays of key channels (``gk [B, T, HV, K]``) and of value channels
    (``gv [B, T, HV, V]``), which multiply, and ``beta [B, T, HV, V]``. Gated DeltaNet: ``fla.ops.gated_delta_rule``.
    """
    g = log_decay(g, use_gate_in_kernel, A_log, dt_bias)
    beta = beta_of(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _erase_and_write(q, k, v, beta, {"g": g, "gk": gk, "gv": gv})


def _kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
) -> Mapped:
    """``S_t = (I - β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ``; ``g [B, T, HV, K]``, ``beta [B, T, HV]``.

    Kimi Delta Attention: ``fla.ops.kda``.
    """
    decay = log_decay(g, use_gate_in_kernel, A_log, dt_bias, lower_bound, safe_gate)
    beta = beta_of(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _erase_and_write(q, k, v, beta, {"gk": decay})


def _gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
) -> Mapped:
    """``S_t = (I - k_t (b_t ⊙ k_t)ᵀ) diag(e^{g_t}) S_{t-1} + k_t (w_t ⊙ v_t)ᵀ``.

    ``g``, ``b`` ``[B, T, HV, K]``, ``w [B, T, HV, V]``. Gated DeltaNet-2: ``fla.ops.gdn2``.
    """
    decay = log_decay(g, use_gate_in_kernel, A_log, dt_bias, lower_bound, safe_gate)
    assert decay is not None
    tensors = {"query": q, "key": k, "value": v, "erase": b, "write": w, "log_decay": decay}
    return Mapped(functional.gated_delta_rule_2, tensors)


def _comba(q: Tensor, k: Tensor, v: Tensor, p: Tensor | None, g: Tensor, beta: Tensor | None = None) -> Mapped:
    """``S_t = e^{g_t} S_{t-1} - β_t k_t p_tᵀ S_{t-1} + β_t k_t v_tᵀ``: the removal reads the state before its decay.

    ``p [B, T, H, K]`` (None: the key), ``g``, ``beta`` ``[B, T, HV]``; ``use_qk_l2norm_in_kernel`` normalises p too. So
    FLA's kernels compute it; its naive reference reads the decayed state. The chunked form takes ``v`` before ``p``,
    the recurrent one ``p`` before ``v``. Comba: ``fla.ops.comba``.
    """
    beta = beta_of(beta, v, False, False)
    apart = beta.ndim == 4
    if apart:
        beta, g = flat("beta", beta, v), repeated(g, v.shape[-1])
    removal_key = k if p is None else p
    tensors = {"query": q, "key": k, "value": v, "beta": beta, "log_decay": g, "removal_key": removal_key}
    mapped = Mapped(functional.comba, tensors)
    return by_columns(mapped) if apart else mapped


def _gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, num_householder: int
) -> Mapped:
    """``S ← e^{g_t} S``, then n times ``S ← (I - β k kᵀ) S + β k vᵀ``, with n = ``num_householder``.

    ``k``, ``v``, ``beta`` hold a token's n steps one after another, ``[B, T · n, H, ·]``; ``q``, ``g`` (or None) and
    ``cu_seqlens`` count tokens. DeltaProduct: ``fla.ops.gated_delta_product``.
    """
    for name, tensor in (("k", k), ("v", v), ("beta", beta)):
        if tensor.shape[1] != q.shape[1] * num_householder:
            raise ValueError(
                f"{name}: got {tensor.shape[1]} steps for {q.shape[1]} tokens, expected T · num_householder = "
                f"{q.shape[1] * num_householder}"
            )
    steps = (q.shape[1], num_householder)
    tensors = {"query": q, "key": k.unflatten(1, steps), "value": v.unflatten(1, steps)}
    tensors["beta"] = beta.unflatten(1, steps)
    return Mapped(functional.delta_product, tensors if g is None else {**tensors, "log_decay": g})


chunk_delta_rule = function("chunk_delta_rule", _delta_rule)
fused_recurrent_delta_rule = function("fused_recurrent_delta_rule", _delta_rule)
chunk_gated_delta_rule = function("chunk_gated_delta_rule", _gated_delta_rule)
fused_recurrent_gated_delta_rule = function("fused_recurrent_gated_delta_rule", _gated_delta_rule)
chunk_gdn, fused_recurrent_gdn = chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
chunk_kda = function("chunk_kda", _kda)
fused_recurrent_kda = function("fused_recurrent_kda", _kda)
chunk_gdn2 = function("chunk_gdn2", _gdn2)
fused_recurrent_gdn2 = function("fused_recurrent_gdn2", _gdn2)
chunk_comba = function("chunk_comba", _comba)
fused_recurrent_comba = function("fused_recurrent_comba", _comba)
chunk_gated_delta_product = function("chunk_gated_delta_product", _gated_delta_product)
