"""Gated DeltaNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from parallelflow.checks import expect_flag
from parallelflow.functional import gated_delta_rule
from parallelflow.nn.decay import initial_log_rates, initial_step_biases, softplus_decay
from parallelflow.nn.delta_net import DeltaNet
from parallelflow.nn.layer import AnyResult
from parallelflow.nn.published import accept, fused_convolution, qwen3_5, qwen3_next


class GatedDeltaNet(DeltaNet):
    """``S_t = (I - β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ`` with ``g = -e^{A_log} softplus(W_a x + dt_bias)``.

    Args:
        output_gate: ``"silu"`` unless given; None is no gate.
        forget_gate: False leaves the decay out, which makes this DeltaNet.
        options: of ``DeltaNet``.

    Source: Yang, Kautz and Hatamizadeh 2025, arXiv 2412.06464; names of flash-linear-attention's ``GatedDeltaNet``.
    The layers of Qwen3-Next, Qwen3.5 and OLMo-Hybrid in Transformers load as well: see ``published``.
    """

    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def __init__(
        self, hidden_size: int, *, output_gate: str | None = "silu", forget_gate: bool = True, **options: Any
    ) -> None:
        expect_flag("forget_gate", forget_gate)
        super().__init__(hidden_size, output_gate=output_gate, **options)
        self.forget_gate = forget_gate
        if forget_gate:
            self.a_proj = nn.Linear(hidden_size, self.num_value_heads, bias=False)
        self.register_initial_values()
        accept(self, qwen3_next, qwen3_5, fused_convolution)

    def initial_values(self) -> dict[str, Tensor]:
        if not self.forget_gate:
            return {}
        heads = self.num_value_heads
        return {"A_log": initial_log_rates(heads, 0, 16), "dt_bias": initial_step_biases(heads)}

    def log_decay(self, hidden_states: Tensor) -> Tensor | None:
        """``[B, T, HV]``."""
        return softplus_decay(self.a_proj(hidden_states), self.A_log, self.dt_bias) if self.forget_gate else None

    def flow(self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AnyResult:
        log_decay = self.log_decay(hidden_states)
        if log_decay is None:
            return super().flow(hidden_states, query, key, value, **options)
        beta = self.beta(hidden_states)
        return gated_delta_rule(query, key, value, beta, log_decay, normalize_query_key=True, **options)
