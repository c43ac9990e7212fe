"""Comba."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from parallelflow.checks import expect_flag, expect_number
from parallelflow.functional import comba
from parallelflow.nn.gated_delta_net import GatedDeltaNet
from parallelflow.nn.layer import AnyResult


class Comba(GatedDeltaNet):
    """``S_t = e^{g_t} S_{t-1} - β_t k_t p_tᵀ S_{t-1} + β_t k_t v_tᵀ``, ``o_t = S_tᵀ (q_t - D p_t)``.

    The removal key is ``p = sigmoid(decay) k``, one number a head; all three vectors are normalised.

    Args:
        inner_decay: False is ``p = k``.
        output_correction: False is D = 0.
        correction_factor: D at the start.
        options: of ``GatedDeltaNet``; the output gate is a sigmoid unless given, ``forget_gate=False`` is g = 0.

    Source: Hu, Pan et al. 2025, arXiv 2506.02475; names of flash-linear-attention's ``Comba``.
    """

    decay: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        *,
        output_gate: str | None = "sigmoid",
        inner_decay: bool = True,
        output_correction: bool = True,
        correction_factor: float = 1.0,
        **options: Any,
    ) -> None:
        expect_flag("inner_decay", inner_decay)
        expect_flag("output_correction", output_correction)
        expect_number("correction_factor", correction_factor)
        if not math.isfinite(correction_factor):
            raise ValueError(f"correction_factor: got {correction_factor}, expected a finite number")
        self.inner_decay, self.output_correction = inner_decay, output_correction
        self.correction_factor = correction_factor
        super().__init__(hidden_size, output_gate=output_gate, **options)

    def initial_values(self) -> dict[str, Tensor]:
        values = super().initial_values()
        if self.inner_decay:
            values["decay"] = torch.ones(self.num_heads)
        if self.output_correction:
            values["D"] = torch.full((self.num_heads,), float(self.correction_factor))
        return values

    def flow(self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AnyResult:
        removal_key = key
        if self.inner_decay:
            removal_key = key * self.decay.sigmoid().to(key.dtype).unsqueeze(-1)
        if self.output_correction:
            query = query - self.D.to(query.dtype).unsqueeze(-1) * removal_key
        beta, log_decay = self.beta(hidden_states), self.log_decay(hidden_states)
        if log_decay is None:
            log_decay = torch.zeros_like(beta)
        return comba(
            query, key, value, beta, log_decay, removal_key=removal_key, normalize_query_key=True, **options
        )  # fmt: skip
