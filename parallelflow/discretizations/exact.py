"""The exact flow of a step whose rows are frozen."""

from __future__ import annotations

from torch import Tensor

from parallelflow.discretizations.base import Phi, identity_like
from parallelflow.discretizations.phi import phi1, phi1_matrix


class Exact:
    """``Φ_a = φ1(X)``, ``Φ_u = φ1(gI + X)``: steps compose, none is too long.

    Rank 1 with ``a = -βk, b = k`` is ``(1 - e^{-β‖k‖²}) / ‖k‖²`` (EFLA, arXiv 2512.12602): the spectrum of its
    transition lies in (0, 1], so it cannot count modulo 2; two skew rows ``a = (x, -y)``, ``b = (y, x)`` are an exact
    rotation.
    On rows that change the order is that of their sampling: 2 at the middle of a step.
    Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492), the product of exponentials.
    """

    name = "exact"
    order = 2

    def scalar(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        read = phi1(x)
        return Phi(read, read if log_decay is None else phi1(x + log_decay))

    def matrix(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        read = phi1_matrix(x)
        if log_decay is None:
            return Phi(read, read)
        return Phi(read, phi1_matrix(x + log_decay[..., None, None] * identity_like(x)))
