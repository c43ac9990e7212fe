"""Across chunks: the state at every chunk's entry.

An aggregate is a function ``(recursion, lanes, initial, reverse) -> Trajectory``. The backward pass runs the same
function on the adjoint recursion, from the last chunk to the first. States ``[lanes, HV, K, V]`` are in the compute
dtype: the widest of the inputs', at least float32.
"""

from parallelflow.aggregate.associative import associative
from parallelflow.aggregate.base import Aggregate, Recursion, Trajectory
from parallelflow.aggregate.segmented import segmented
from parallelflow.aggregate.sequential import sequential

AGGREGATES: dict[str, Aggregate] = {
    "sequential": sequential,
    "associative": associative,
    "segmented": segmented,
}

__all__ = ["AGGREGATES", "Aggregate", "Recursion", "Trajectory", "associative", "segmented", "sequential"]
