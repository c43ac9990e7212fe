"""Kimi Delta Attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from parallelflow.checks import expect_flag, expect_number
from parallelflow.functional import kimi_delta_attention
from parallelflow.nn.decay import initial_log_rates, initial_step_biases, softplus_decay
from parallelflow.nn.delta_net import DeltaNet
from parallelflow.nn.layer import AnyResult, low_rank
from parallelflow.nn.published import accept, fused_convolution, kimi_linear


class KimiDeltaAttention(DeltaNet):
    """``S_t = (I - β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ`` with g for each key channel,
    ``g = -e^{A_log} softplus(W_f x + dt_bias)``.

    Args:
        lower_bound: b < 0 makes it ``g = b · sigmoid(e^{A_log} (W_f x + dt_bias))``, in (b, 0).
        low_rank_gates: whether ``f_proj`` and ``g_proj`` are products through V channels (``f_proj.0``, ``f_proj.1``),
            or one matrix each.
        output_gate: ``"sigmoid"`` unless given, as published; None is no gate.
        options: of ``DeltaNet``.

    Source: Kimi Linear, Kimi Team 2025, arXiv 2510.26692; names of flash-linear-attention's ``KimiDeltaAttention``. The
    layers of Kimi-Linear's own checkpoints and of Kimi Linear, GLM-5 and Bailing in Transformers load as well.
    """

    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        *,
        lower_bound: float | None = None,
        low_rank_gates: bool = True,
        output_gate: str | None = "sigmoid",
        **options: Any,
    ) -> None:
        if lower_bound is not None:
            expect_number("lower_bound", lower_bound)
            if not -math.inf < lower_bound < 0:
                raise ValueError(f"lower_bound: got {lower_bound}, expected a negative number or None")
        expect_flag("low_rank_gates", low_rank_gates)
        super().__init__(hidden_size, output_gate=output_gate, low_rank_gate=low_rank_gates, **options)
        self.lower_bound = lower_bound
        gates = self.num_value_heads * self.head_dim
        if low_rank_gates:
            self.f_proj: nn.Module = low_rank(hidden_size, self.value_head_dim, gates)
        else:
            self.f_proj = nn.Linear(hidden_size, gates, bias=False)
        self.register_initial_values()
        accept(self, kimi_linear, fused_convolution)

    def initial_values(self) -> dict[str, Tensor]:
        heads = self.num_value_heads
        bounded = self.lower_bound is not None
        log_rates = torch.zeros(heads) if bounded else initial_log_rates(heads, 1, 16)
        return {"A_log": log_rates, "dt_bias": initial_step_biases(heads * self.head_dim)}

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """``[B, T, HV, K]``."""
        heads = (self.num_value_heads, self.head_dim)
        raw, bias, log_rate = self.f_proj(hidden_states).unflatten(-1, heads), self.dt_bias.view(heads), self.A_log
        if self.lower_bound is None:
            return softplus_decay(raw, log_rate.unsqueeze(-1), bias)
        wide = torch.promote_types(raw.dtype, torch.float32)
        rate = log_rate.to(wide).exp().unsqueeze(-1)
        return self.lower_bound * torch.sigmoid(rate * (raw.to(wide) + bias.to(wide)))

    def flow(self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AnyResult:
        beta, log_decay = self.beta(hidden_states), self.log_decay(hidden_states)
        return kimi_delta_attention(query, key, value, beta, log_decay, normalize_query_key=True, **options)
