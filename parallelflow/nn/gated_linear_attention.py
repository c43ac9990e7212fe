"""Gated linear attention."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from parallelflow.checks import expect_positive_integer, expect_positive_number
from parallelflow.functional import gated_linear_attention
from parallelflow.nn.layer import AnyResult, head_size, low_rank
from parallelflow.nn.query_key_value import QueryKeyValueLayer


class GatedLinearAttention(QueryKeyValueLayer):
    """``S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ`` with ``g = log sigmoid(W_gk x + b) / τ`` for each key channel.

    Args:
        num_heads: H.
        head_dim: K; None is D / 2 over the heads, as published.
        value_head_dim: V; None is D over the heads.
        conv_size: 0 unless given: no convolution, and then no SiLU either.
        output_gate: ``"silu"`` unless given; None is no gate.
        decay_rank: the channels between ``gk_proj.0`` and ``gk_proj.1``.
        temperature: τ.
        options: of ``QueryKeyValueLayer``.

    Source: Yang, Wang, Shen, Panda and Kim 2024, arXiv 2312.06635; names of flash-linear-attention's
    ``GatedLinearAttention``: the norm is ``g_norm_swish_gate``, or ``g_norm`` without such a gate.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 0,
        output_gate: str | None = "silu",
        decay_rank: int = 16,
        temperature: float = 16.0,
        **options: Any,
    ) -> None:
        expect_positive_integer("decay_rank", decay_rank)
        expect_positive_number("temperature", temperature)
        self.norm_name = "g_norm_swish_gate" if output_gate == "silu" else "g_norm"
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            head_dim=head_size(hidden_size // 2, num_heads) if head_dim is None else head_dim,
            value_head_dim=head_size(hidden_size, num_heads) if value_head_dim is None else value_head_dim,
            conv_size=conv_size,
            output_gate=output_gate,
            **options,
        )
        self.temperature = temperature
        self.gk_proj = low_rank(hidden_size, decay_rank, self.num_value_heads * self.head_dim, bias=True)

    def activate(self, inputs: Tensor) -> Tensor:
        return inputs

    def flow(self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AnyResult:
        raw = self.gk_proj(hidden_states).unflatten(-1, (self.num_value_heads, self.head_dim))
        return gated_linear_attention(query, key, value, F.logsigmoid(raw) / self.temperature, **options)
