"""Inside a chunk: solving ``(I - G) X = Z`` for a strictly lower triangular ``G``.

A solver is a function ``factor(gram, block) -> Factorisation``: what can be done once is done there, and the same
factorisation serves the forward pass (``solve``), and the backward pass (``solve_transposed``). ``gram [..., n, n]``
and right sides ``[..., n, D]`` have one floating dtype, the factorisation's; ``block`` is R where the rows of a token
are simultaneous, else 1.
"""

from __future__ import annotations

from parallelflow.solvers.base import Factorisation, Solver
from parallelflow.solvers.sequential import sequential
from parallelflow.solvers.sigdelta import sigdelta
from parallelflow.solvers.substitution import substitution
from parallelflow.solvers.tensor_inverse import tensor_inverse

SOLVERS: dict[str, Solver] = {
    "tensor_inverse": tensor_inverse,
    "substitution": substitution,
    "sequential": sequential,
    "sigdelta": sigdelta,
}

__all__ = ["SOLVERS", "Factorisation", "Solver", "sequential", "sigdelta", "substitution", "tensor_inverse"]
