"""Backward Euler: the rows read the state that they are about to make."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.discretizations.base import Phi, identity_like


class BackwardEuler:
    """``Φ = (I - X)⁻¹`` on the decayed state, for reads and values alike: implicit, order 1, ties hold.

    Rank 1 with ``a = -βk, b = k`` is ``β / (1 + β‖k‖²)``, the step of Longhorn (arXiv 2407.14207): stable for any
    β ≥ 0. Where X has the eigenvalue 1 there is no step: infinite for one row, an error of ``torch.linalg`` for
    several.
    """

    name = "backward_euler"
    order = 1

    def scalar(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        phi = 1 / (1 - x)
        return Phi(phi, phi)

    def matrix(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        phi = torch.linalg.inv(identity_like(x) - x)
        return Phi(phi, phi)
