"""Layers that project a query, a key and a value for each head, run a flow, and read out through a gated norm."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.checks import expect_choice, expect_flag, expect_positive_integer, expect_positive_number
from parallelflow.integrate import Options
from parallelflow.nn.convolution import depthwise, short_convolution
from parallelflow.nn.layer import AnyResult, Layer, Memory, Mixed, Sequences, head_size, low_rank
from parallelflow.nn.norm import ACTIVATIONS, GatedRMSNorm


class QueryKeyValueLayer(Layer):
    """``q, k, v = SiLU(conv(W x))``, a flow of them, ``W_o (norm(o) ⊙ σ(W_g x))``.

    Args:
        hidden_size: D.
        num_heads: H, of queries and keys.
        head_dim: K; None is D // H.
        num_value_heads: HV, a multiple of H; None is H.
        value_head_dim: V; None is K.
        conv_size: the width W of the short convolutions; 0 is none.
        conv_bias: whether the convolutions have a bias.
        output_gate: σ, ``"silu"`` or ``"sigmoid"``; None is no gate.
        low_rank_gate: whether g_proj is a product through V channels (``g_proj.0``, ``g_proj.1``), or one matrix.
        rows: R, values a token; given, keys and values have an axis for it.
        key_rows: keys a token; None is R.
        norm_eps: of the norm over each head's output.
        engine: see ``Layer``.

    Parameters are named as flash-linear-attention names them: ``q_proj, k_proj, v_proj``, ``q_conv1d, k_conv1d,
    v_conv1d``, ``g_proj``, ``o_norm``, ``o_proj``.
    """

    norm_name = "o_norm"

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        output_gate: str | None = None,
        low_rank_gate: bool = False,
        rows: int | None = None,
        key_rows: int | None = None,
        norm_eps: float = 1e-5,
        engine: Options | None = None,
    ) -> None:
        super().__init__(hidden_size, engine)
        expect_positive_integer("num_heads", num_heads)
        if conv_size != 0 or isinstance(conv_size, bool):
            expect_positive_integer("conv_size", conv_size)
        expect_flag("conv_bias", conv_bias)
        expect_positive_number("norm_eps", norm_eps)
        if output_gate is not None:
            expect_choice("output_gate", output_gate, ACTIVATIONS)
        self.num_heads, self.num_value_heads = num_heads, num_heads if num_value_heads is None else num_value_heads
        self.head_dim = head_size(hidden_size, num_heads) if head_dim is None else head_dim
        self.value_head_dim = self.head_dim if value_head_dim is None else value_head_dim
        self.rows = 1 if rows is None else rows
        self.key_rows = self.rows if key_rows is None else key_rows
        self.stacked = rows is not None
        for name in ("num_value_heads", "head_dim", "value_head_dim", "rows", "key_rows"):
            expect_positive_integer(name, getattr(self, name))
        if self.num_value_heads % num_heads:
            raise ValueError(f"num_value_heads: got {self.num_value_heads}, expected a multiple of {num_heads} heads")
        key_size, value_size = num_heads * self.head_dim, self.num_value_heads * self.value_head_dim
        self.sizes = [key_size, self.key_rows * key_size, self.rows * value_size]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, size, bias=False) for size in self.sizes)
        if conv_size:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (depthwise(n, conv_size, conv_bias) for n in self.sizes)
        self.conv_size = conv_size
        if output_gate is not None and low_rank_gate:
            self.g_proj: nn.Module = low_rank(hidden_size, self.value_head_dim, value_size, bias=True)
        elif output_gate is not None:
            self.g_proj = nn.Linear(hidden_size, value_size, bias=False)
        self.output_gate = output_gate
        norm = GatedRMSNorm(self.value_head_dim, eps=norm_eps, activation=output_gate or "silu")
        self.add_module(self.norm_name, norm)
        self.o_proj = nn.Linear(value_size, hidden_size, bias=False)

    @abstractmethod
    def flow(self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AnyResult:
        """The model's function of ``query [B, T, H, K]``, ``key [B, T, (R,) H, K]``, ``value [B, T, (R,) HV, V]``."""

    def activate(self, inputs: Tensor) -> Tensor:
        """After the projections, without a convolution; after a convolution it is always SiLU."""
        return F.silu(inputs)

    def mix(self, hidden_states: Tensor, memory: Memory | None, sequences: Sequences) -> Mixed:
        window, state = memory or (None, None)
        inputs = torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)], -1)
        if self.conv_size:
            convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            weight = torch.cat([each.weight for each in convolutions])
            biases = [each.bias for each in convolutions if each.bias is not None]
            bias = torch.cat(biases) if biases else None
            inputs, window = short_convolution(
                inputs, weight, bias, silu=True, window=window, **sequences.line()
            )  # one for all channels
        else:
            inputs = self.activate(inputs)
        query, key, value = inputs.split(self.sizes, -1)
        key_rows, rows = ((self.key_rows,), (self.rows,)) if self.stacked else ((), ())
        result = self.flow(
            hidden_states,
            query.unflatten(-1, (self.num_heads, self.head_dim)),
            key.unflatten(-1, (*key_rows, self.num_heads, self.head_dim)),
            value.unflatten(-1, (*rows, self.num_value_heads, self.value_head_dim)),
            **self.options(state, sequences),
        )
        gate = None
        if self.output_gate is not None:
            gate = self.g_proj(hidden_states).unflatten(-1, (self.num_value_heads, self.value_head_dim))
        norm = self.get_submodule(self.norm_name)
        output = self.o_proj(norm(result.output, gate).flatten(-2))
        return Mixed(output, sequences.memory(window, result.final_state))
