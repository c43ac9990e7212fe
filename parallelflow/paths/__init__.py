"""Continuous inputs: observations become a path, a path drives a linear equation, the equation is stepped in parallel.

times, values → linear | hermite | rectilinear → Path → controlled(path, field) → DriverSource → integrate
                                                      → log_ode(path, field, windows) → LowRankDriver → integrate
                                                      → solve(controlled(…)): steps as fine as a tolerance asks

Times and values are of any floating dtype; float64 keeps long clocks apart. What does not fit raises a TypeError or
ValueError that names the argument.
"""

from parallelflow.paths.adaptive import Refinement, Solution, refine, solve
from parallelflow.paths.controlled import LinearField, controlled
from parallelflow.paths.interpolation import Path, hermite, linear, rectilinear
from parallelflow.paths.log_signature import log_ode, log_signature

__all__ = [
    "LinearField",
    "Path",
    "Refinement",
    "Solution",
    "controlled",
    "hermite",
    "linear",
    "log_ode",
    "log_signature",
    "rectilinear",
    "refine",
    "solve",
]
