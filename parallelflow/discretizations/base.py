"""What a scheme is: a function Φ of the rows' products, and nothing else."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Phi(NamedTuple):
    """``Φ_a`` for the reads and ``Φ_u`` for the values; the very same tensor where they are equal: ties hold."""

    read: Tensor
    value: Tensor


class Scheme(Protocol):
    """One step of ``dS = (g + B Aᵀ) S dt + B Uᵀ dt`` over unit time, g a number:

        S⁺ = e^g S + B (Φ_a Aᵀ e^g S + Φ_u Uᵀ),     Φ_a = Φ(X) ≈ φ1(X),  Φ_u ≈ φ1(gI + X),  X = AᵀB

    The decay is solved exactly in every scheme; what is approximated is the exponential of the rows.

    Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492).
    """

    name: str
    order: int
    """Of convergence on drivers that vary in time, sampled at the middle of each step (no or scalar decay)."""

    def scalar(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        """Φ of one row's ``x = aᵀb``, elementwise; None where rows stay as they are."""

    def matrix(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        """Φ of ``X [..., R, R]``; ``log_decay`` is ``[...]``."""


def identity_like(x: Tensor) -> Tensor:
    """I, of the size, dtype and device of ``X [..., R, R]``, without batch axes."""
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
