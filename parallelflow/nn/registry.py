"""Layers by name, for configurations."""

from __future__ import annotations

from typing import Any

from parallelflow.checks import expect_choice, nearest
from parallelflow.nn.attention import SoftmaxAttention
from parallelflow.nn.comba import Comba
from parallelflow.nn.delta_net import DeltaNet
from parallelflow.nn.delta_product import DeltaProduct
from parallelflow.nn.gated_delta_net import GatedDeltaNet
from parallelflow.nn.gated_linear_attention import GatedLinearAttention
from parallelflow.nn.kimi_delta_attention import KimiDeltaAttention
from parallelflow.nn.layer import Layer, options_of
from parallelflow.nn.low_rank_flow import LowRankFlow
from parallelflow.nn.mamba2 import Mamba2
from parallelflow.nn.rwkv7 import RWKV7

LAYERS: dict[str, type[Layer]] = {
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "delta_product": DeltaProduct,
    "kimi_delta_attention": KimiDeltaAttention,
    "rwkv7": RWKV7,
    "gated_linear_attention": GatedLinearAttention,
    "mamba2": Mamba2,
    "comba": Comba,
    "low_rank_flow": LowRankFlow,
    "softmax_attention": SoftmaxAttention,
}


ITS_OWN = ("hidden_size", "rows", "key_rows", "low_rank_gate")
"""What is not chosen by an option, but by the kind of layer."""


def layer_options(name: str) -> list[str]:
    """The keywords that the layer takes.

    Raises:
        ValueError: for a name that is not in ``LAYERS``.
    """
    expect_choice("layer", name, LAYERS)
    return [option for option in options_of(LAYERS[name]) if option not in ITS_OWN]


def make_layer(name: str, hidden_size: int, **options: Any) -> Layer:
    """The layer of that name.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an option that the layer does not take, naming those it does.
    """
    known = layer_options(name)
    for option in options:
        if option not in known:
            raise TypeError(f"{option}: {name} has no such option{nearest(option, known)}; it has {', '.join(known)}")
    return LAYERS[name](hidden_size, **options)
