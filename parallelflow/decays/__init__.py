"""A chunk's decays: every factor ``e^{c_p - c_q}`` with ``q`` before ``p``, none of them above 1, and their adjoints.

``c`` is the sum of log-decays from the chunk's start. A difference of such sums loses the small terms beside large ones
(a decay of -100 beside one of -1e-6), so the sums are kept in float64, where 64 tokens at the floor below leave an
error of 1e-11, and are rounded only after the subtraction. ``e^{-c}`` alone, which overflows, is never formed.

Notation: rows p, q belong to tokens; M chunks, HV value heads, C tokens a chunk, n rows.
"""

from parallelflow.decays.base import Decay, accurate
from parallelflow.decays.none import NoDecay
from parallelflow.decays.rows import Family, Rows, Scaled, dots, product_onto, scale_rows, sum_to_heads, to_heads
from parallelflow.decays.scalar import ScalarDecay
from parallelflow.decays.vector import VectorDecay

__all__ = [
    "Decay",
    "Family",
    "NoDecay",
    "Rows",
    "ScalarDecay",
    "Scaled",
    "VectorDecay",
    "accurate",
    "dots",
    "product_onto",
    "scale_rows",
    "sum_to_heads",
    "to_heads",
]
