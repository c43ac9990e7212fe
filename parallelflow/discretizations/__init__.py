"""How time is stepped: from a driver's continuous system to the rows of discrete tokens.

One file a scheme; ``discretize`` applies one to a driver, or to a ``DriverSource`` that varies inside a step.
Rows keep their dtype; the R × R matrices of a scheme are computed in at least float32. What a scheme cannot step raises
a ValueError.
"""

from parallelflow.discretizations.discretize import SCHEMES, Discretization, discretize
from parallelflow.discretizations.source import DriverSource

__all__ = ["SCHEMES", "Discretization", "DriverSource", "discretize"]
