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

LARGEST = 60
"""Doublings; matrices of a norm above 2^59 are beyond any digits."""


def phi1(x: Tensor) -> Tensor:
    """``(e^x - 1) / x``, elementwise, 1 at 0: to a few roundings for every x, and so are its derivatives.

    Near 0 the quotient itself is fine (``expm1``) but its derivative cancels; there the series is taken.
    """
    near = x.abs() <= 1
    far = torch.where(near, 1, x)  # what `where` does not choose must be finite, or its gradient is NaN
    return torch.where(near, _series(torch.where(near, x, 0), 0), torch.expm1(far) / far)


def phi1_matrix(x: Tensor) -> Tensor:
    """φ1 of matrices ``[..., R, R]``, in float64 whatever the dtype.

    Scaling and doubling: the series where the norm is at most ½, then, with ``E = e^X - I = X φ1(X)``, from X to 2X
    ``φ1 ← φ1 + ½ E φ1``, ``E ← 2E + E²``, each matrix as often as its norm asks; slow modes keep their digits beside
    fast ones, and roundings contract where the system decays. Relative errors of 1e-15 for norms up to
    1 and for decaying systems of any norm, of about 1e-16 times the norm for rotations by many turns. Inside the
    compiler and function transforms, where norms cannot be looked at, ``torch.linalg.matrix_exp`` of the augmented
    matrix: the same to rounding and several times slower.
    Source: Skaflestad and Wright 2009, *The scaling and modified squaring method for matrix functions related to the
    exponential*.
    """
    size = x.shape[-1]
    if size == 1:
        return phi1(x)
    hidden = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    return (_augmented if hidden or x.numel() == 0 else _doubled)(x.double()).to(x.dtype)


def _augmented(x: Tensor) -> Tensor:
    """The corner of ``exp [[X, I], [0, 0]] = [[e^X, φ1(X)], [0, I]]``."""
    size = x.shape[-1]
    identity = torch.eye(size, dtype=x.dtype, device=x.device).expand_as(x)
    return torch.linalg.matrix_exp(pad(torch.cat((x, identity), -1), (0, 0, 0, size)))[..., :size, size:]


def _doubled(x: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(x.detach(), 1)
    doublings = torch.log2(2 * norm).ceil().clamp(0, LARGEST).nan_to_num(0.0)
    x = x * torch.exp2(-doublings)[..., None, None]
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    square = x @ x
    powers = (identity, x, square, square @ x)
    fourth = square @ square
    total = torch.zeros_like(x)
    for block in (12, 8, 4, 0):  # Σ_{n<16} Xⁿ / (n+1)! in blocks of four powers
        total = total @ fourth
        for n, power in enumerate(powers):
            total = total + power / math.factorial(block + n + 1)
    growth = x @ total  # e^X - I
    for doubling in range(int(doublings.max())):
        more = (doublings > doubling)[..., None, None]
        total = torch.where(more, total + growth @ total / 2, total)
        growth = torch.where(more, 2 * growth + growth @ growth, growth)
    return total


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
