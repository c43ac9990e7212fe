"""The classical Runge-Kutta method of order 4, on a step whose rows are frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from parallelflow.discretizations.base import Phi, identity_like
from parallelflow.discretizations.phi import moments


class RungeKutta4:
    """``Φ_a = Σ_{n<4} Xⁿ / (n+1)!``, ``Φ_u = Σ_{n<4} J_n(g) Xⁿ / n!``: explicit, of order 4 on frozen rows.

    ``J_n(g) = ∫_0^1 sⁿ e^{gs} ds`` (so ``J_n(0) = 1/(n+1)``): the decay is integrated exactly, and strong ones do no
    harm. On rows that change it is of the order of its sampling: 2 at the middle of a step. Large rows blow up: with
    β‖k‖² above 2.785 the transition of the delta rule grows.
    """

    name = "rk4"
    order = 2

    def scalar(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        read = _polynomial(x, FROZEN)
        if log_decay is None:
            return Phi(read, read)
        return Phi(read, _polynomial(x, _weights(log_decay)))

    def matrix(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        identity = identity_like(x)
        read = _polynomial_of_matrix(x, [weight * identity for weight in FROZEN])
        if log_decay is None:
            return Phi(read, read)
        weights = [weight[..., None, None] * identity for weight in _weights(log_decay)]
        return Phi(read, _polynomial_of_matrix(x, weights))


FROZEN = [1 / math.factorial(n + 1) for n in range(4)]


def _weights(log_decay: Tensor) -> list[Tensor]:
    """``J_n(g) / n!``."""
    return [moment / math.factorial(n) for n, moment in enumerate(moments(log_decay, 4))]


def _polynomial(x: Tensor, weights: Sequence[Tensor | float]) -> Tensor:
    total = torch.zeros_like(x) + weights[-1]
    for weight in reversed(weights[:-1]):
        total = total * x + weight
    return total


def _polynomial_of_matrix(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    total = weights[-1]
    for weight in reversed(weights[:-1]):
        total = total @ x + weight
    return total
