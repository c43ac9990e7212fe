"""Root-mean-square normalisation with a gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.checks import expect_choice

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


class GatedRMSNorm(nn.Module):
    """``w ⊙ x / rms(x) ⊙ σ(gate)``, or ``w ⊙ y / rms(y)`` of ``y = x ⊙ σ(gate)`` with ``gate_first``.

    Args:
        size: the channels that ``weight`` scales, the last axis.
        groups: the last axis is normalised in this many equal parts.
        activation: σ, ``"silu"`` or ``"sigmoid"``.

    Computed in at least float32; the output has the inputs' dtype.
    """

    def __init__(
        self, size: int, *, eps: float = 1e-5, activation: str = "silu", groups: int = 1, gate_first: bool = False
    ) -> None:
        super().__init__()
        expect_choice("activation", activation, ACTIVATIONS)
        if size % groups:
            raise ValueError(f"groups: got {groups}, expected a divisor of the {size} channels")
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.activation, self.groups, self.gate_first = eps, activation, groups, gate_first

    def forward(self, inputs: Tensor, gate: Tensor | None = None) -> Tensor:
        """``inputs [..., size]``, ``gate [..., size]`` or None: no gate."""
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        strength = None if gate is None else ACTIVATIONS[self.activation](gate.to(wide.dtype))
        if strength is not None and self.gate_first:
            wide = wide * strength
        parts = wide.unflatten(-1, (self.groups, -1))
        wide = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        wide = wide * self.weight
        if strength is not None and not self.gate_first:
            wide = wide * strength
        return wide.to(inputs.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, activation={self.activation!r}, groups={self.groups}"
