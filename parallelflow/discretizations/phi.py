"""φ1, of numbers and of matrices, and the moments of a decay: what the schemes are made of.

φ1(X) = ∫_0^1 e^{sX} ds = Σ_n Xⁿ / (n+1)!        J_n(g) = ∫_0^1 sⁿ e^{gs} ds,  J_0 = φ1
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

TERMS = 18
"""Of a series in |x| ≤ 1: the first one left out is below 1e-17."""


def phi1(x: Tensor) -> Tensor:
    """``(e^x - 1) / x``, elementwise, 1 at 0: to a few roundings for every x, and so are its derivatives.

    Near 0 the quotient itself is fine (``expm1``) but its derivative cancels; there the series is taken.
    """
    near = x.abs() <= 1
    far = torch.where(near, 1, x)  # what `where` does not choose must be finite, or its gradient is NaN
    return torch.where(near, _series(torch.where(near, x, 0), 0), torch.expm1(far) / far)


def phi1_matrix(x: Tensor) -> Tensor:
    """φ1 of matrices ``[..., R, R]``: the corner of ``exp [[X, I], [0, 0]] = [[e^X, φ1(X)], [0, I]]``.

    Scaling and squaring in float64, whatever the dtype: relative errors of 1e-15 for norms up to 1, of about 1e-16
    times the norm for rotations by many turns, and no overflow for decaying systems of any norm.
    Source: Al-Mohy and Higham 2011, *Computing the action of the matrix exponential*, theorem 2.1.
    """
    size = x.shape[-1]
    if size == 1:
        return phi1(x)
    wide = x.double()
    identity = torch.eye(size, dtype=wide.dtype, device=x.device).expand_as(wide)
    exponential = torch.linalg.matrix_exp(pad(torch.cat((wide, identity), -1), (0, 0, 0, size)))
    return exponential[..., :size, size:].to(x.dtype)


def moments(g: Tensor, count: int) -> list[Tensor]:
    """``J_0 … J_{count-1}`` of ``g [...]``, elementwise: how a source that grows like ``sⁿ`` adds up under a decay.

    ``J_n = (e^g - n J_{n-1}) / g`` away from 0, which loses a factor ``n / |g|`` a step; the series near it.
    """
    near = g.abs() <= 1
    far, small = torch.where(near, 1, g), torch.where(near, g, 0)
    found = [phi1(g)]
    recurrence = torch.expm1(far) / far
    for n in range(1, count):
        recurrence = (torch.exp(far) - n * recurrence) / far
        found.append(torch.where(near, _series(small, n), recurrence))
    return found


def _series(x: Tensor, n: int) -> Tensor:
    """``J_n(x) = Σ_m x^m / (m! (m + n + 1))`` by Horner's rule, for |x| ≤ 1."""
    total = torch.full_like(x, 1 / (math.factorial(TERMS) * (TERMS + n + 1)))
    for m in reversed(range(TERMS)):
        total = total * x + 1 / (math.factorial(m) * (m + n + 1))
    return total
