"""Models as drivers: each names its tensors, and copies nothing.

Tensors are of any floating dtype. What does not fit together raises a TypeError or ValueError, here for what a driver
alone can tell and in ``integrate`` for the rest.
"""

from parallelflow.drivers.base import Factor, LowRankDriver, Row
from parallelflow.drivers.delta import delta_rule, efla, longhorn
from parallelflow.drivers.delta_product import delta_product
from parallelflow.drivers.gated_delta import comba, gated_delta_rule, gated_delta_rule_2, kimi_delta_attention
from parallelflow.drivers.linear import gated_linear_attention, lightning_attention, linear_attention, retention, ssd
from parallelflow.drivers.low_rank import low_rank_flow
from parallelflow.drivers.rwkv7 import rwkv7

__all__ = [
    "Factor",
    "LowRankDriver",
    "Row",
    "comba",
    "delta_product",
    "delta_rule",
    "efla",
    "gated_delta_rule",
    "gated_delta_rule_2",
    "gated_linear_attention",
    "kimi_delta_attention",
    "lightning_attention",
    "linear_attention",
    "longhorn",
    "low_rank_flow",
    "retention",
    "rwkv7",
    "ssd",
]
