"""What Transformers' models call, on this engine: the same arguments, layouts, dtypes and results.

Transformers 5 has one set of functions for all models of a kind, under the same names in every modelling file; these
take their places. What a model passes along to every layer (the ``**kwargs`` of its ``forward``) ends in ``**_``, as it
does there. Source: ``transformers/models/{qwen3_next,kimi_linear,mamba2}/modeling_*.py`` of Transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from parallelflow import functional, step
from parallelflow.nn.convolution import short_convolution


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """``S_t = (I - β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ``, a prompt or one token of it.

    ``query``, ``key`` ``[B, T, H, K]``, ``value [B, T, HV, V]``, ``beta [B, T, HV]``, ``g [B, T, HV]``, or
    ``[B, T, HV, K]`` (Kimi); the state ``[N, HV, K, V]``. Packed sequences
    (``cu_seqlens``, or what models pass on as ``cu_seq_lens_q``) are kept apart.
    """
    model: Any = functional.gated_delta_rule if g.ndim == 3 else functional.kimi_delta_attention
    return model(
        query,
        key,
        value,
        beta,
        g,
        chunk_size=chunk_size,
        initial_state=None if initial_state is None else initial_state.to(_wide(initial_state)),
        return_final_state=output_final_state,
        normalize_query_key=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seq_lens_q if cu_seqlens is None else cu_seqlens,
        validate=False,  # g is -e^A · softplus(…) by construction, and NaN passes through as it does there
    )


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """``S_t = e^{A dt_t} S_{t-1} + B_t (dt_t x_t)ᵀ``, ``y_t = S_tᵀ C_t + D x_t``, in float32.

    ``hidden_states`` (x) ``[B, T, H, P]``, ``dt [B, T, H]``, ``A``, ``D``, ``dt_bias`` ``[H]``, ``B``, ``C``
    ``[B, T, G, N]``. The state is theirs, ``[B, H, P, N]``, the engine's transposed. ``chunk_size`` is a tuning of
    theirs, mostly 256, and chooses nothing here.
    """
    dt = torch.clamp(_step_size(dt, dt_bias, dt_softplus), min=dt_limit[0], max=dt_limit[1])
    written = (hidden_states * dt.unsqueeze(-1)).to(hidden_states.dtype)
    state = None if initial_states is None else initial_states.transpose(-1, -2).to(_wide(initial_states))
    output, final = functional.ssd(
        C,
        B,
        written,
        A.to(dt.dtype) * dt,
        initial_state=state,
        return_final_state=return_final_states,
        validate=False,
    )[:2]
    output = output.to(_wide(output))
    if D is not None:
        output = output + D.unsqueeze(-1) * hidden_states.to(output.dtype)
    return output if final is None else (output, final.transpose(-1, -2))


def mamba2_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """One token of ``mamba2_chunk_scan``; ``state [B, H, P, N]`` is updated in place.

    ``hidden_states [B, H, P]``; ``dt [B, H, P]``, ``A [H, P, N]``, ``D``, ``dt_bias`` ``[H, P]``: a head's, expanded.
    """
    dt = _step_size(dt, dt_bias, dt_softplus)
    written = (hidden_states * dt).to(hidden_states.dtype)
    output, final = step.ssd(
        C,
        B,
        written,
        A[:, 0, 0].to(dt.dtype) * dt[..., 0],
        state=state.transpose(-1, -2).to(_wide(state)),
        validate=False,
    )
    assert final is not None
    state.copy_(final.transpose(-1, -2))
    if D is not None:
        output = output + D * hidden_states
    return (output if z is None else output * silu(z)).to(hidden_states.dtype)


def causal_conv1d(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The short convolution of ``[B, C, T]``, by ours on a CPU, where a depthwise ``conv1d`` is slow; else by theirs.

    Ours keeps packed sequences apart, by ``seq_idx [1, T]`` or ``cu_seq_lens_q``, as their CUDA kernel does.
    """

    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        if hidden_states.device.type != "cpu" or activation not in (None, "silu", "swish"):
            packed = {} if seq_idx is None else {"seq_idx": seq_idx}
            return theirs(hidden_states, weight, bias, activation=activation, **packed, **others)
        starts = cu_seq_lens_q if seq_idx is None else _starts(seq_idx)
        tokens = hidden_states.transpose(1, 2)
        output, _ = short_convolution(
            tokens.to(weight.dtype), weight.unsqueeze(1), bias, silu=activation is not None, cu_seqlens=starts
        )
        return output.to(hidden_states.dtype).transpose(1, 2)

    return causal_conv1d_fn


def _starts(seq_idx: Tensor) -> Tensor:
    """``cu_seqlens`` of the runs of equal numbers."""
    lengths = torch.unique_consecutive(seq_idx[0], return_counts=True)[1]
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = softplus(dt) if dt_softplus else dt
    return dt.to(_wide(dt))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def same(ours: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A replacement that has no use for what it replaces."""
    return lambda theirs: ours


MODELS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "torch_chunk_gated_delta_rule": same(gated_delta_rule),
    "torch_recurrent_gated_delta_rule": same(gated_delta_rule),
    "chunk_kimi_delta_attention": same(gated_delta_rule),
    "recurrent_kimi_delta_attention": same(gated_delta_rule),
    "mamba2_chunk_scan": same(mamba2_chunk_scan),
    "mamba2_selective_state_update": same(mamba2_selective_state_update),
}
"""Name in Transformers → what takes its place, made from what it replaces."""

AROUND: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {"causal_conv1d_fn": causal_conv1d}
"""Replaced only in layers that call one of ``MODELS``."""
