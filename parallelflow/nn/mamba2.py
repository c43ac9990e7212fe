"""Mamba-2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.checks import expect_flag, expect_number, expect_positive_integer, expect_positive_number
from parallelflow.functional import ssd
from parallelflow.integrate import Options
from parallelflow.nn.convolution import depthwise, short_convolution
from parallelflow.nn.decay import initial_log_rates, initial_step_biases
from parallelflow.nn.layer import Layer, Memory, Mixed, Sequences
from parallelflow.nn.norm import GatedRMSNorm


class Mamba2(Layer):
    """``S_t = e^{A dt_t} S_{t-1} + B_t (dt_t x_t)ᵀ``, ``y_t = S_tᵀ C_t + D x_t``, ``W_o norm(y ⊙ SiLU(z))``.

    z, x, B, C and dt are one projection; x, B and C pass a short convolution and SiLU; ``dt = softplus(dt + dt_bias)``
    and ``A = -e^{A_log}``, one number a head.

    Args:
        hidden_size: D.
        expand: the inner size is this many times D.
        head_dim: V, the inner channels of a head.
        state_size: K, the channels of B and C.
        num_groups: heads of B and C, a divisor of the number of heads.
        conv_size, conv_bias: of the short convolution.
        bias: whether the projections have one.
        time_step_limit: the bounds of dt.
        norm_eps: of the norm, which is taken in ``num_groups`` groups.
        engine: see ``Layer``.

    Source: Dao and Gu 2024, arXiv 2405.21060; names of Transformers' and flash-linear-attention's mixers.
    """

    A_log: nn.Parameter
    dt_bias: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        *,
        expand: int = 2,
        head_dim: int = 64,
        state_size: int = 128,
        num_groups: int = 1,
        conv_size: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        time_step_limit: tuple[float, float] = (0.0, float("inf")),
        norm_eps: float = 1e-5,
        engine: Options | None = None,
    ) -> None:
        super().__init__(hidden_size, engine)
        sizes = {"expand": expand, "head_dim": head_dim, "state_size": state_size, "num_groups": num_groups}
        for name, size in sizes.items():
            expect_positive_integer(name, size)
        expect_flag("conv_bias", conv_bias)
        expect_flag("bias", bias)
        expect_positive_number("norm_eps", norm_eps)
        if not isinstance(time_step_limit, list | tuple) or len(time_step_limit) != 2:
            raise TypeError(f"time_step_limit: got {time_step_limit!r}, expected two numbers")
        for bound in time_step_limit:
            expect_number("time_step_limit", bound)
        if not 0 <= time_step_limit[0] <= time_step_limit[1]:
            raise ValueError(f"time_step_limit: got {time_step_limit}, expected 0 ≤ lower ≤ upper")
        self.inner_size, self.head_dim, self.state_size = expand * hidden_size, head_dim, state_size
        self.num_heads, self.num_groups = self.inner_size // head_dim, num_groups
        if self.num_heads * head_dim != self.inner_size or self.num_heads % num_groups:
            raise ValueError(
                f"head_dim: got {head_dim} and num_groups {num_groups}, expected heads that divide expand · hidden_size"
                f" = {self.inner_size} into a number of heads that the groups divide"
            )
        self.time_step_limit = time_step_limit
        groups_size = num_groups * state_size
        self.sizes = [self.inner_size, self.inner_size + 2 * groups_size, self.num_heads]
        self.convolved_sizes = [self.inner_size, groups_size, groups_size]
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=bias)
        self.conv1d = depthwise(self.sizes[1], conv_size, conv_bias)
        self.register_initial_values()
        self.norm = GatedRMSNorm(self.inner_size, eps=norm_eps, groups=num_groups, gate_first=True)
        self.out_proj = nn.Linear(self.inner_size, hidden_size, bias=bias)

    def initial_values(self) -> dict[str, Tensor]:
        heads = self.num_heads
        return {
            "A_log": initial_log_rates(heads, 1, 16),
            "dt_bias": initial_step_biases(heads),
            "D": torch.ones(heads),
        }

    def mix(self, hidden_states: Tensor, memory: Memory | None, sequences: Sequences) -> Mixed:
        window, state = memory or (None, None)
        gate, inputs, step = self.in_proj(hidden_states).split(self.sizes, -1)
        inputs, window = short_convolution(
            inputs, self.conv1d.weight, self.conv1d.bias, silu=True, window=window, **sequences.line()
        )
        value, key, query = inputs.split(self.convolved_sizes, -1)
        value = value.unflatten(-1, (self.num_heads, self.head_dim))
        key, query = (x.unflatten(-1, (self.num_groups, self.state_size)) for x in (key, query))
        wide = torch.promote_types(step.dtype, torch.float32)
        step = F.softplus(step.to(wide) + self.dt_bias.to(wide)).clamp(*self.time_step_limit)
        result = ssd(
            query,
            key,
            (value * step.unsqueeze(-1)).to(value.dtype),
            -self.A_log.to(wide).exp() * step,
            **self.options(state, sequences),
        )
        output = result.output + self.D.to(value.dtype).unsqueeze(-1) * value
        return Mixed(self.out_proj(self.norm(output.flatten(-2), gate)), sequences.memory(window, result.final_state))
