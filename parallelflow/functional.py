"""Every model as a function of its tensors: a driver, integrated.

All take ``query, key [B, T, H, K]`` and ``value [B, T, HV, V]`` (HV a multiple of H: value head h reads key head
``h // (HV // H)``) and return ``Result(output [B, T, HV, V], final_state [N, HV, K, V] or None)``. ``**options`` are of
``Options``: ``integrate``'s, and ``normalize_query_key``, which divides query and keys by their norm,
``x · rsqrt(Σ x² + 1e-6)``. Log-decays are natural and ≤ 0; -inf resets the state. The formulas below are Euler's steps
of a continuous system; ``discretization`` takes others.

Tensors are of one dtype, float64, float32, bfloat16 or float16, coefficients and log-decays of any of these; states
and sums are in the widest that there is, at least float32. What does not fit raises a TypeError or ValueError that
names the argument, what came and what is expected.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallelflow import drivers
from parallelflow.again import remembered
from parallelflow.checks import check_layouts, expect_flag, nearest
from parallelflow.drivers.base import LowRankDriver, Order, Reads
from parallelflow.integrate import Options as IntegrateOptions
from parallelflow.integrate import Result, ResultWithStates, integrate
from parallelflow.kernels.watch import Derived, tell
from parallelflow.problem import autocast_dtype, without_autocast


class Options(IntegrateOptions, total=False):
    """``integrate``'s options, where each is explained, and whether query and keys are divided by their norm first."""

    normalize_query_key: bool


OPTION_NAMES = sorted({*IntegrateOptions.__annotations__, *Options.__annotations__})


@remembered
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, normalize: bool = False, **options: Unpack[Options]
) -> Result | ResultWithStates:
    """``S_t = S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``; ``options`` are of ``Options``.
    With ``normalize``, ``o_t = S_tᵀ q_t / (z_tᵀ q_t)`` (0 where the divisor is 0) with ``z_t = Σ_{s≤t} k_s``, which is
    carried as one more value channel: states are then ``[N, HV, K, V + 1]``, the last column z.
    Source: Katharopoulos, Vyas, Pappas and Fleuret 2020, arXiv 2006.16236.
    """
    check_layouts(query=(query, "B T H K"), key=(key, "B T H K"), value=(value, "B T HV V"))
    query, key, rest = _prepare(query, key, options)
    expect_flag("normalize", normalize)
    if not normalize:
        return integrate(drivers.linear_attention(key, value), query, **rest)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected the query's, {query.dtype}")
    dtype = autocast_dtype(query)
    wide = torch.promote_types(dtype, torch.float32)  # the quotient is rounded once, at the end
    query, key, value = (tensor.to(dtype).to(wide) for tensor in (query, key, value))
    with without_autocast(query.device):
        result = integrate(drivers.linear_attention(key, pad(value, (0, 1), value=1.0)), query, **rest)
    numerator, denominator = result.output[..., :-1], result.output[..., -1:]
    return result._replace(output=(numerator / torch.where(denominator == 0, 1, denominator)).to(dtype))


@remembered
def retention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, **options: Unpack[Options]
) -> Result | ResultWithStates:
    """``S_t = e^{g_h} S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``log_decay [HV]``, one value per head; ``options`` are of
    ``Options``.
    Source: RetNet, Sun et al. 2023, arXiv 2307.08621.
    """
    check_layouts(
        query=(query, "B T H K"), key=(key, "B T H K"), value=(value, "B T HV V"), log_decay=(log_decay, "HV")
    )
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.retention(key, value, log_decay), query, **rest)


@remembered
def lightning_attention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, **options: Unpack[Options]
) -> Result | ResultWithStates:
    """``S_t = e^{g_h} S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``log_decay [HV]``, one value per head; ``options`` are of
    ``Options``.
    Source: Lightning Attention, Qin et al. 2024, arXiv 2401.04658.
    """
    check_layouts(
        query=(query, "B T H K"), key=(key, "B T H K"), value=(value, "B T HV V"), log_decay=(log_decay, "HV")
    )
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.lightning_attention(key, value, log_decay), query, **rest)


@remembered
def ssd(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, **options: Unpack[Options]
) -> Result | ResultWithStates:
    """``S_t = e^{g_t} S_{t-1} + k_t v_tᵀ``, ``o_t = S_tᵀ q_t``: Mamba-2 with C the query, B the key, dt·x the value.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, already multiplied by dt, ``log_decay [B, T, HV]``;
    ``options`` are of ``Options``, and ``scale`` is 1 unless given.
    Source: Mamba-2, Dao and Gu 2024, arXiv 2405.21060.
    """
    check_layouts(
        query=(query, "B T H K"), key=(key, "B T H K"), value=(value, "B T HV V"), log_decay=(log_decay, "B T HV")
    )
    query, key, rest = _prepare(query, key, options, scale=1.0)
    return integrate(drivers.ssd(key, value, log_decay), query, **rest)


@remembered
def gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, **options: Unpack[Options]
) -> Result | ResultWithStates:
    """``S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``log_decay [B, T, HV, K]``; ``options`` are of ``Options``.
    Source: GLA, Yang, Wang, Shen, Panda and Kim 2024, arXiv 2312.06635.
    """
    check_layouts(
        query=(query, "B T H K"), key=(key, "B T H K"), value=(value, "B T HV V"), log_decay=(log_decay, "B T HV K")
    )
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.gated_linear_attention(key, value, log_decay), query, **rest)


@remembered
def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, **options: Unpack[Options]
) -> Result | ResultWithStates:
    """``S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]``; ``options`` are of ``Options``.
    Source: DeltaNet, Yang, Wang, Zhang, Shen and Kim 2024, arXiv 2406.06484.
    """
    _check_delta(query, key, value, beta)
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.delta_rule(key, value, beta), query, **rest)


@remembered
def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, **options: Unpack[Options]
) -> Result | ResultWithStates:
    """``S_t = (I - β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta``, ``log_decay`` ``[B, T, HV]``; ``options`` are of
    ``Options``.
    Source: Gated DeltaNet, Yang, Kautz and Hatamizadeh 2025, arXiv 2412.06464.
    """
    _check_delta(query, key, value, beta, log_decay=(log_decay, "B T HV"))
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.gated_delta_rule(key, value, beta, log_decay), query, **rest)


@remembered
def gated_delta_rule_2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    erase: Tensor,
    write: Tensor,
    log_decay: Tensor,
    **options: Unpack[Options],
) -> Result | ResultWithStates:
    """``S_t = (I - k_t (b_t ⊙ k_t)ᵀ) diag(e^{g_t}) S_{t-1} + k_t (w_t ⊙ v_t)ᵀ``, ``o_t = scale · S_tᵀ q_t``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``erase`` (b) ``[B, T, HV, K]``, ``write`` (w)
    ``[B, T, HV, V]``, ``log_decay [B, T, HV, K]``; ``options`` are of ``Options``.
    Source: Gated DeltaNet-2, as implemented in flash-linear-attention 0.6.0.
    """
    check_layouts(
        query=(query, "B T H K"),
        key=(key, "B T H K"),
        value=(value, "B T HV V"),
        erase=(erase, "B T HV K"),
        write=(write, "B T HV V"),
        log_decay=(log_decay, "B T HV K"),
    )
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.gated_delta_rule_2(key, value, erase, write, log_decay), query, **rest)


@remembered
def kimi_delta_attention(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, **options: Unpack[Options]
) -> Result | ResultWithStates:
    """``S_t = (I - β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]``, ``log_decay [B, T, HV, K]``; ``options``
    are of ``Options``.
    Source: Kimi Linear, Kimi Team 2025, arXiv 2510.26692.
    """
    _check_delta(query, key, value, beta, log_decay=(log_decay, "B T HV K"))
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.kimi_delta_attention(key, value, beta, log_decay), query, **rest)


@remembered
def comba(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    removal_key: Tensor,
    **options: Unpack[Options],
) -> Result | ResultWithStates:
    """``S_t = e^{g_t} S_{t-1} - β_t k_t p_tᵀ S_{t-1} + β_t k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta``, ``log_decay`` ``[B, T, HV]``, ``removal_key`` (p)
    ``[B, T, H, K]``, normalised like the key by ``normalize_query_key``; ``options`` are of ``Options``.
    Source: Comba, Hu, Pan et al. 2025, arXiv 2506.02475, as its published kernels compute it.
    """
    _check_delta(query, key, value, beta, log_decay=(log_decay, "B T HV"), removal_key=(removal_key, "B T H K"))
    if options.get("normalize_query_key"):
        removal_key = _normalized(removal_key)
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.comba(key, value, beta, log_decay, removal_key), query, **rest)


@remembered
def delta_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    **options: Unpack[Options],
) -> Result | ResultWithStates:
    """``S ← e^{g_t} S``, then for j = 1 … R ``S ← (I - β_tj k_tj k_tjᵀ) S + β_tj k_tj v_tjᵀ``.

    ``o_t = scale · S_tᵀ q_t``, read after the token's last step. ``query [B, T, H, K]``, ``key [B, T, R, H, K]``,
    ``value [B, T, R, HV, V]``, ``beta [B, T, R, HV]``, ``log_decay [B, T, HV]`` or None; ``options`` are of
    ``Options``.
    Source: DeltaProduct, Siems et al. 2025, arXiv 2502.10297.
    """
    check_layouts(
        query=(query, "B T H K"),
        key=(key, "B T R H K"),
        value=(value, "B T R HV V"),
        beta=(beta, "B T R HV"),
        log_decay=(log_decay, "B T HV?"),
    )
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.delta_product(key, value, beta, log_decay), query, **rest)


@remembered
def rwkv7(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    read: Tensor,
    write: Tensor,
    **options: Unpack[Options],
) -> Result | ResultWithStates:
    """``S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ``, ``o_t = S_tᵀ q_t``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``log_decay``, ``read`` (a), ``write`` (b) ``[B, T, HV, K]``;
    ``options`` are of ``Options``, and ``scale`` is 1 unless given.
    Source: RWKV-7, Peng et al. 2025, arXiv 2503.14456.
    """
    check_layouts(
        query=(query, "B T H K"),
        key=(key, "B T H K"),
        value=(value, "B T HV V"),
        log_decay=(log_decay, "B T HV K"),
        read=(read, "B T HV K"),
        write=(write, "B T HV K"),
    )
    query, key, rest = _prepare(query, key, options, scale=1.0)
    return integrate(drivers.rwkv7(key, value, log_decay, read, write), query, **rest)


@remembered
def longhorn(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, **options: Unpack[Options]
) -> Result | ResultWithStates:
    """``S_t = (I - β' k_t k_tᵀ) S_{t-1} + β' k_t v_tᵀ`` with ``β' = β / (1 + β‖k‖²)``.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]`` ≥ 0; ``options`` are of ``Options``.
    Source: Longhorn, Liu, Wang, Wu, Feng, Stone and Liu 2024, arXiv 2407.14207 (its dense form, one β a head).
    """
    _check_delta(query, key, value, beta)
    _check_own_step("longhorn", "backward_euler", options)
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.longhorn(key, value, beta), query, **rest)


@remembered
def efla(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, **options: Unpack[Options]
) -> Result | ResultWithStates:
    """``S_t = (I - β' k_t k_tᵀ) S_{t-1} + β' k_t v_tᵀ`` with ``β' = (1 - e^{-β‖k‖²}) / ‖k‖²``, the exact flow of the
    delta rule.

    ``query, key [B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]``; ``options`` are of ``Options``.
    Source: error-free linear attention, Lei et al. 2025, arXiv 2512.12602.
    """
    _check_delta(query, key, value, beta)
    _check_own_step("efla", "exact", options)
    query, key, rest = _prepare(query, key, options)
    return integrate(drivers.efla(key, value, beta), query, **rest)


@remembered
def low_rank_flow(
    query: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    read: Tensor,
    write: Tensor,
    order: Order = "simultaneous",
    reads: Reads = "decayed",
    **options: Unpack[Options],
) -> Result | ResultWithStates:
    """``S ← diag(e^{g_t}) S``, then ``S ← S + Σ_j b_tj (a_tjᵀ S + u_tjᵀ)``; ``o_t = scale · S_tᵀ q_t``.

    ``query [B, T, H, K]``, ``read`` (a), ``write`` (b) ``[B, T, R, H or HV, K]``, ``value`` (u) ``[B, T, R, HV, V]``,
    ``log_decay`` None, ``[B, T, HV]`` or ``[B, T, HV, K]``; ``order`` "simultaneous" or "sequential", ``reads``
    "decayed" or "raw"; ``options`` are of ``Options``. There is no key to normalise: ``normalize_query_key`` raises.
    Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492), section 3.
    """
    check_layouts(
        query=(query, "B T H K"),
        value=(value, "B T R HV V"),
        read=(read, "B T R H|HV K"),
        write=(write, "B T R H|HV K"),
        log_decay=(log_decay, "B T HV K?" if getattr(log_decay, "ndim", 3) == 4 else "B T HV?"),
    )
    if options.get("normalize_query_key"):
        raise ValueError("normalize_query_key: got True, expected False: low_rank_flow has no key")
    query, _, rest = _prepare(query, query, options)
    return integrate(drivers.low_rank_flow(value, log_decay, read, write, order, reads), query, **rest)


def _check_delta(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, **more: tuple[Tensor, str]) -> None:
    check_layouts(
        query=(query, "B T H K"), key=(key, "B T H K"), value=(value, "B T HV V"), beta=(beta, "B T HV"), **more
    )


def _check_own_step(model: str, scheme: str, options: Options) -> None:
    """ValueError for another discretisation of what is one already."""
    if options.get("discretization") is not None:
        raise ValueError(
            f"discretization: got {options['discretization']!r}, expected none: {model} is {scheme!r} of delta_rule, "
            "which takes any"
        )


def _prepare(
    query: Tensor, key: Tensor, options: Options, scale: float | None = None
) -> tuple[Tensor, Tensor, IntegrateOptions]:
    """Refuses unknown options, takes those that are not ``integrate``'s, and sets the model's default scale."""
    for name in options:
        if name not in OPTION_NAMES:
            known = ", ".join(OPTION_NAMES)
            raise TypeError(f"{name}: unknown option{nearest(name, OPTION_NAMES)}; the options are {known}")
    rest: Any = dict(options)
    normalize = rest.pop("normalize_query_key", False)
    expect_flag("normalize_query_key", normalize)
    if rest.get("scale") is None:
        rest["scale"] = scale
    if normalize:
        query, key = _normalized(query), _normalized(key)
    return query, key, rest


def _normalized(vectors: Tensor) -> Tensor:
    """``x · rsqrt(Σ x² + 1e-6)``, summed in at least float32."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    unit = (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(vectors.dtype)
    tell(lambda: Derived(vectors, unit, _normalized))
    return unit


__all__ = [
    "LowRankDriver",
    "Options",
    "comba",
    "delta_product",
    "delta_rule",
    "efla",
    "gated_delta_rule",
    "gated_delta_rule_2",
    "gated_linear_attention",
    "kimi_delta_attention",
    "lightning_attention",
    "linear_attention",
    "longhorn",
    "low_rank_flow",
    "retention",
    "rwkv7",
    "ssd",
]
