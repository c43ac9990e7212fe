"""Layers against flash-linear-attention's, which need a GPU: outputs of its version 0.6.0 are kept in a file.

They were computed in float32 from the weights and inputs of ``weights`` and ``inputs``, sines of the square of a place,
for a sequence of 9 tokens. The file has the names and shapes of the layer's parameters, and the outputs of two tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallelflow.nn import (
    RWKV7,
    Comba,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    Layer,
)

KEPT = json.loads((Path(__file__).parent / "flash_linear_attention.json").read_text())

LAYERS: dict[str, Callable[[], Layer]] = {
    "DeltaNet": lambda: DeltaNet(32, num_heads=2),
    "DeltaNet, β ≤ 2, gate, bias": lambda: DeltaNet(
        32, num_heads=2, negative_eigenvalues=True, output_gate="silu", conv_bias=True
    ),
    "GatedDeltaNet": lambda: GatedDeltaNet(32, num_heads=2, head_dim=16, value_head_dim=32, num_value_heads=4),
    "GatedDeltaProduct": lambda: DeltaProduct(32, num_heads=2),
    "GatedDeltaProduct, 3 steps, no gates": lambda: DeltaProduct(
        32, num_heads=2, num_householder=3, forget_gate=False, output_gate=None, negative_eigenvalues=False
    ),
    "KimiDeltaAttention": lambda: KimiDeltaAttention(32, num_heads=2, num_value_heads=4),
    "GatedLinearAttention": lambda: GatedLinearAttention(32, num_heads=2),
    "GatedLinearAttention, convolution, no gate": lambda: GatedLinearAttention(
        32, num_heads=2, conv_size=4, output_gate=None
    ),
    "Comba": lambda: Comba(32, num_heads=2, value_head_dim=32),
    "Comba, plain": lambda: Comba(
        32, num_heads=2, value_head_dim=32, inner_decay=False, output_correction=False, output_gate=None
    ),
    "RWKV7Attention, first": lambda: RWKV7(32, head_dim=16, layer_index=0, num_layers=3),
    "RWKV7Attention, second": lambda: RWKV7(32, head_dim=16, layer_index=1, num_layers=3),
}


def sines(shape: list[int] | torch.Size, phase: float) -> Tensor:
    count = torch.Size(shape).numel()
    place = torch.arange(count, dtype=torch.float64)
    return torch.sin(0.37 * place.square() + phase).float().view(shape)


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """By name: sines whose phase is of the name's letters, around 1 for norms."""
    return {
        name: 0.3 * sines(shape, sum(map(ord, name))) + ("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def inputs() -> tuple[Tensor, Tensor]:
    """Hidden states, and the first layer's values."""
    return sines([1, 9, 32], 1.0), sines([1, 9, 32], 2.0)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_outputs_are_those_of_flash_linear_attention(name):
    layer, kept = LAYERS[name](), KEPT[name]
    layer.load_state_dict(weights(kept["parameters"]))
    hidden_states, first_value = inputs()
    options = {"first_value": first_value} if name.endswith("second") else {}
    output = layer(hidden_states, **options).output[0, [4, 8]]
    expected = torch.tensor(kept["outputs"])
    assert expected.abs().max() > 0.05
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
