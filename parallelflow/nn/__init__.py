"""Layers: a linear-attention model with its projections, short convolution, gates and norms, as published.

All are called alike, with hidden states ``[B, T, D]``; see ``Layer``. ``LinearCDE`` takes times and observations.
Hidden states have the parameters' dtype; decays and states are computed in at least float32. What does not fit raises a
TypeError or ValueError that names the argument.
"""

from parallelflow.nn.attention import KeysAndValues, SoftmaxAttention
from parallelflow.nn.block import Block, GatedMLP
from parallelflow.nn.comba import Comba
from parallelflow.nn.delta_net import DeltaNet
from parallelflow.nn.delta_product import DeltaProduct
from parallelflow.nn.gated_delta_net import GatedDeltaNet
from parallelflow.nn.gated_linear_attention import GatedLinearAttention
from parallelflow.nn.kimi_delta_attention import KimiDeltaAttention
from parallelflow.nn.layer import Layer, Memory, Mixed, set_context_group
from parallelflow.nn.linear_cde import LinearCDE
from parallelflow.nn.low_rank_flow import LowRankFlow
from parallelflow.nn.mamba2 import Mamba2
from parallelflow.nn.registry import LAYERS, layer_options, make_layer
from parallelflow.nn.rwkv7 import RWKV7

__all__ = [
    "DeltaNet",
    "GatedDeltaNet",
    "DeltaProduct",
    "KimiDeltaAttention",
    "RWKV7",
    "GatedLinearAttention",
    "Mamba2",
    "Comba",
    "LowRankFlow",
    "LinearCDE",
    "SoftmaxAttention",
    "Block",
    "GatedMLP",
    "Layer",
    "Memory",
    "KeysAndValues",
    "Mixed",
    "LAYERS",
    "layer_options",
    "make_layer",
    "set_context_group",
]
