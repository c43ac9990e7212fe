"""Cayley, or the implicit midpoint rule: the rows read the mean of the states before and after them."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.discretizations.base import Phi, identity_like
from parallelflow.discretizations.phi import phi1


class Cayley:
    """``Φ_a = (I - X/2)⁻¹``, ``Φ_u = φ1(g) Φ_a``: implicit, order 2.

    With ``B Aᵀ`` skew and no values the transition ``(I - BAᵀ/2)⁻¹ (I + BAᵀ/2)`` is orthogonal: norms are preserved to
    rounding. Eigenvalues of the transition tend to -1, not to 0, as the rows grow. Where X has the eigenvalue 2 there
    is no step. The values are averaged over the step's decay, φ1(g), so that rows that only write are exact.
    """

    name = "cayley"
    order = 2

    def scalar(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        phi = 1 / (1 - x / 2)
        return Phi(phi, phi if log_decay is None else phi * phi1(log_decay))

    def matrix(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        phi = torch.linalg.inv(identity_like(x) - x / 2)
        return Phi(phi, phi if log_decay is None else phi * phi1(log_decay)[..., None, None])
