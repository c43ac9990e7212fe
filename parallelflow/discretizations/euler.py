"""Euler: the rows as they are. With ``a = -βk, b = k, u = βv`` it is the delta rule."""

from __future__ import annotations

from torch import Tensor

from parallelflow.discretizations.base import Phi


class Euler:
    """``Φ = I``: explicit, order 1, every row what the model says. Its spectrum may be negative (β between 1 and 2)."""

    name = "euler"
    order = 1

    def scalar(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        return None

    def matrix(self, x: Tensor, log_decay: Tensor | None) -> Phi | None:
        return None
