"""Left-looking substitution: each row gathers from all rows before it."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.solvers.base import Stepwise


class sequential(Stepwise):
    """``X_p = Z_p + Σ_{q<p} G[p,q] X_q``, one block of rows after another: n/block - 1 stages of growing sums.

    The recurrence itself, read inside a chunk. ``block`` rows whose mutual entries of G are zero are found at once.
    """

    @staticmethod
    def recursion(gram: Tensor, right: Tensor, block: int) -> Tensor:
        found = right[..., :block, :]
        for start in range(block, right.shape[-2], block):
            rows = slice(start, start + block)
            row = right[..., rows, :] + gram[..., rows, :start] @ found
            found = torch.cat((found, row), -2)
        return found
