"""Layers: a linear-attention model with its projections, short convolution, gates and norms, as published.

All are called alike, with hidden states ``[B, T, D]``; see ``Layer``.
"""

from parallelflow.nn.comba import Comba
from parallelflow.nn.delta_net import DeltaNet
from parallelflow.nn.delta_product import DeltaProduct
from parallelflow.nn.gated_delta_net import GatedDeltaNet
from parallelflow.nn.gated_linear_attention import GatedLinearAttention
from parallelflow.nn.kimi_delta_attention import KimiDeltaAttention
from parallelflow.nn.layer import Layer, Memory, Mixed
from parallelflow.nn.mamba2 import Mamba2
from parallelflow.nn.rwkv7 import RWKV7

__all__ = [
    "Comba",
    "DeltaNet",
    "DeltaProduct",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "KimiDeltaAttention",
    "Layer",
    "Mamba2",
    "Memory",
    "Mixed",
    "RWKV7",
]
