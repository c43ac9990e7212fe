"""ParallelFlow: every linear-attention model as one low-rank flow, computed in parallel, exactly.

``functional`` holds a function per model, ``step`` their single-step forms, ``integrate`` runs any ``LowRankDriver``.
"""

from parallelflow import step
from parallelflow.discretizations import Discretization, DriverSource, discretize
from parallelflow.drivers import Factor, LowRankDriver, Row
from parallelflow.flow import Flow, compose
from parallelflow.functional import (
    comba,
    delta_product,
    delta_rule,
    efla,
    gated_delta_rule,
    gated_delta_rule_2,
    gated_linear_attention,
    kimi_delta_attention,
    lightning_attention,
    linear_attention,
    longhorn,
    low_rank_flow,
    retention,
    rwkv7,
    ssd,
)
from parallelflow.integrate import Result, ResultWithStates, integrate

__version__ = "0.1.0"

__all__ = [
    "Discretization",
    "DriverSource",
    "Factor",
    "Flow",
    "LowRankDriver",
    "Result",
    "ResultWithStates",
    "Row",
    "comba",
    "compose",
    "delta_product",
    "delta_rule",
    "discretize",
    "efla",
    "gated_delta_rule",
    "gated_delta_rule_2",
    "gated_linear_attention",
    "integrate",
    "kimi_delta_attention",
    "lightning_attention",
    "linear_attention",
    "longhorn",
    "low_rank_flow",
    "retention",
    "rwkv7",
    "ssd",
    "step",
]
