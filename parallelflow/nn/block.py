"""A layer of a language model: mix tokens, then channels, each after a norm and added to what came in."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.checks import expect_positive_integer
from parallelflow.nn.layer import Layer


class GatedMLP(nn.Module):
    """``W_down (SiLU(W_gate x) ⊙ W_up x)`` (SwiGLU, Shazeer 2020, arXiv 2002.05202).

    Args:
        hidden_size: D.
        intermediate_size: the channels between; None is 8/3 D, rounded up to a multiple of 256.
    """

    def __init__(self, hidden_size: int, intermediate_size: int | None = None) -> None:
        super().__init__()
        size = -(-hidden_size * 8 // 3 // 256) * 256 if intermediate_size is None else intermediate_size
        expect_positive_integer("intermediate_size", size)
        self.gate_proj, self.up_proj = (nn.Linear(hidden_size, size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``hidden_states [..., D]`` to ``[..., D]``."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Block(nn.Module):
    """``x + attn(attn_norm(x))``, then ``x + mlp(mlp_norm(x))``.

    Args:
        attn: the layer that mixes tokens: any of this package.
        intermediate_size: of the MLP, see ``GatedMLP``.
        norm_eps: of both norms.

    Called as its layer is, and returns as it does, with the block's hidden states. Names of flash-linear-attention's
    models.
    """

    def __init__(self, attn: Layer, *, intermediate_size: int | None = None, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(attn.hidden_size, eps=norm_eps)
        self.attn = attn
        self.mlp_norm = nn.RMSNorm(attn.hidden_size, eps=norm_eps)
        self.mlp = GatedMLP(attn.hidden_size, intermediate_size)

    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        """``hidden_states [B, T, D]`` and the options of the layer, to what the layer returns."""
        mixed = self.attn(self.attn_norm(hidden_states), **options)
        hidden_states = hidden_states + mixed.output
        return mixed._replace(output=hidden_states + self.mlp(self.mlp_norm(hidden_states)))
