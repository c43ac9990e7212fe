"""RWKV-7's time mixing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.checks import expect_flag, expect_positive_integer, expect_positive_number
from parallelflow.functional import rwkv7
from parallelflow.integrate import Options
from parallelflow.nn.convolution import token_shift
from parallelflow.nn.layer import Layer, Memory, Sequences

DECAY_BOUND = -0.6065306597126334
"""``-e^{-1/2}``: log-decays are in (DECAY_BOUND, 0)."""

SHIFT_POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""What is mixed with the token before it, and the power of its initial share."""


class MixedWithValue(NamedTuple):
    """``Mixed``, and the values ``[B, T, D]`` of the model's first layer, which its later layers take as
    ``first_value``."""

    output: Tensor
    memory: Memory | None
    first_value: Tensor

    def per_token(self, change: Callable[[Tensor], Tensor]) -> MixedWithValue:
        """With every tensor that has a row a token changed."""
        return self._replace(output=change(self.output), first_value=change(self.first_value))


class LowRank(nn.Module):
    """``x ↦ B f(A x) + b``; parameters ``lora.0.weight``, ``lora.2.weight``, ``lora.2.bias``."""

    def __init__(self, size: int, rank: int, activation: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.rank = rank
        first, second = nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=bias)
        self.lora = nn.Sequential(first, activation, second)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.lora(inputs)


class RWKV7(Layer):
    """``S_t = (diag(e^{w_t}) - (a_t ⊙ κ_t) κ_tᵀ) S_{t-1} + k_t v_tᵀ``, with a value residual over layers.

    With ``x'`` the token before and ``x_* = x + μ_* ⊙ (x' - x)``:
    ``r, k, v = W x_r, W x_k, W x_v``, ``w = -e^{-1/2} sigmoid(w_lora(x_w))``, ``a = sigmoid(a_lora(x_a))``,
    ``κ`` the normalised ``k ⊙ k_k``, ``k ← k ⊙ (1 + (a - 1) ⊙ k_a)``; with a value residual
    ``v ← v + (v_first - v) ⊙ sigmoid(v_lora(x_v))``. Then
    ``o_t = S_tᵀ r_t``, and the output is ``W_o ((groupnorm(o) + (r ⊙ r_k ⊙ k summed over a head) v) ⊙ g_lora(x_g))``.

    Args:
        hidden_size: D.
        head_dim: K = V.
        layer_index, num_layers: where in the model the layer stands; initial values depend on both.
        value_residual: whether values are mixed with those of the model's first such layer; None: in all but layer 0.
        decay_rank, rate_rank, value_rank, gate_rank: of ``w_lora``, ``a_lora``, ``v_lora``, ``g_lora``; None: the
            published ranks for this D and K.
        norm_eps: times ``head_dim``, the group norm's.
        engine: see ``Layer``.

    With a value residual it is called with ``first_value [B, T, D]`` as well. Returns ``MixedWithValue``.

    Source: Peng et al. 2025, arXiv 2503.14456; names of flash-linear-attention's ``RWKV7Attention``.
    """

    k_k: nn.Parameter
    k_a: nn.Parameter
    r_k: nn.Parameter
    takes_first_value = True

    def __init__(
        self,
        hidden_size: int,
        *,
        head_dim: int = 64,
        layer_index: int = 0,
        num_layers: int = 1,
        value_residual: bool | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float = 1e-5,
        engine: Options | None = None,
    ) -> None:
        super().__init__(hidden_size, engine)
        expect_positive_integer("head_dim", head_dim)
        expect_positive_integer("num_layers", num_layers)
        if isinstance(layer_index, bool) or not isinstance(layer_index, int):
            raise TypeError(f"layer_index: got {layer_index!r}, expected an integer")
        if not 0 <= layer_index < num_layers:
            raise ValueError(
                f"layer_index: got {layer_index}, expected at least 0 and less than num_layers = {num_layers}"
            )
        if value_residual is not None:
            expect_flag("value_residual", value_residual)
        ranks = {"decay_rank": decay_rank, "rate_rank": rate_rank, "value_rank": value_rank, "gate_rank": gate_rank}
        for name, rank in ranks.items():
            if rank is not None:
                expect_positive_integer(name, rank)
        expect_positive_number("norm_eps", norm_eps)
        if hidden_size % head_dim:
            raise ValueError(f"head_dim: got {head_dim}, expected a divisor of hidden_size = {hidden_size}")
        self.num_heads, self.head_dim = hidden_size // head_dim, head_dim
        self.layer_index, self.num_layers = layer_index, num_layers
        self.value_residual = layer_index > 0 if value_residual is None else value_residual
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )

        def lora(rank: int | None, slope: float, activation: nn.Module, bias: bool = True) -> LowRank:
            published = max(32, round(slope * hidden_size**0.5 / 32) * 32)
            return LowRank(hidden_size, published if rank is None else rank, activation, bias)

        growth = head_dim / 64
        self.w_lora = lora(decay_rank, 2.5 * growth, nn.Tanh())
        self.a_lora = lora(rate_rank, 2.5 * growth, nn.Identity())
        if self.value_residual:
            self.v_lora = lora(value_rank, 1.7 * growth, nn.Identity())
        self.g_lora = lora(gate_rank, 5, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(self.num_heads, hidden_size, eps=head_dim * norm_eps)
        self.register_initial_values()

    def initial_values(self) -> dict[str, Tensor]:
        """The published ones: https://github.com/BlinkDL/RWKV-LM, RWKV-v7."""
        size, index, layers = self.hidden_size, self.layer_index, self.num_layers
        depth, rest = index / max(layers - 1, 1), 1 - index / layers
        channel = torch.arange(size)
        share, line = channel / size, channel / max(size - 1, 1)
        within = (channel % self.head_dim) / max(self.head_dim - 1, 1) * 2 - 1
        zigzag, slope = within * within.abs(), line - 0.5
        values = {f"x_{name}": (1 - share ** (power * rest)).view(1, 1, -1) for name, power in SHIFT_POWERS.items()}
        values["k_k"] = 0.71 - 0.1 * slope
        values["k_a"] = torch.full((size,), 1.02)
        values["r_k"] = torch.full((self.num_heads, self.head_dim), -0.04)
        values["w_lora.lora.2.bias"] = -6 + 6 * line ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
        values["a_lora.lora.2.bias"] = -0.19 + 0.3 * zigzag + 0.4 * slope
        if self.value_residual:
            values["v_lora.lora.2.bias"] = 0.73 - 0.4 * slope
        for name, module in self.named_children():
            if isinstance(module, LowRank):
                gain = 0.1 * max(1.0, (module.rank / size) ** 0.5)
                values[f"{name}.lora.0.weight"] = torch.zeros(module.rank, size)
                values[f"{name}.lora.2.weight"] = nn.init.orthogonal_(torch.empty(size, module.rank), gain)
        values["g_norm.weight"] = torch.full((size,), ((index + 1) / layers) ** 0.7)
        for name, gain in (("r_proj", 1.0), ("k_proj", 0.1), ("v_proj", 1.0)):
            values[f"{name}.weight"] = nn.init.orthogonal_(torch.empty(size, size), gain)
        values["o_proj.weight"] = torch.zeros(size, size)
        return values

    def mix(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        memory: Memory | None,
        sequences: Sequences,
        first_value: Tensor | None = None,
    ) -> MixedWithValue:
        window, state = memory or (None, None)
        previous, window = token_shift(hidden_states, window=window, **sequences.line())
        change = previous - hidden_states
        shares = {name: self.get_parameter(f"x_{name}").to(change.dtype) for name in SHIFT_POWERS}
        shifted = {name: torch.addcmul(hidden_states, change, share) for name, share in shares.items()}
        query, key, value = self.r_proj(shifted["r"]), self.k_proj(shifted["k"]), self.v_proj(shifted["v"])
        if not self.value_residual:
            first_value = value
        elif first_value is None:
            raise ValueError("first_value: got None, expected the model's first layer's: this one mixes it in")
        else:
            value = torch.lerp(value, first_value, self.v_lora(shifted["v"]).sigmoid())
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        log_decay = DECAY_BOUND * self.w_lora(shifted["w"]).to(wide).sigmoid()
        rate = self.a_lora(shifted["a"]).sigmoid()
        removed = F.normalize(self._heads(key * self.k_k.to(key.dtype)), dim=-1)
        key = self._heads(torch.addcmul(key, key * (rate - 1), self.k_a.to(key.dtype)))
        query, value = self._heads(query), self._heads(value)
        result = rwkv7(
            query,
            key,
            value,
            self._heads(log_decay),
            read=-removed,
            write=removed * self._heads(rate),
            **self.options(state, sequences),
        )
        output = self.g_norm(result.output.flatten(0, 1).flatten(1)).view(*hidden_states.shape)
        bonus = (query * key * self.r_k.to(key.dtype)).sum(-1, keepdim=True) * value
        output = (output + bonus.flatten(-2)) * self.g_lora(shifted["g"])
        return MixedWithValue(self.o_proj(output), sequences.memory(window, result.final_state), first_value)

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.num_heads, self.head_dim))
