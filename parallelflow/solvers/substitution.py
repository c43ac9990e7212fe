"""Right-looking substitution: each row, once known, is sent to all rows after it."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.solvers.base import Stepwise

TOGETHER = 8


class substitution(Stepwise):
    """``F(m+1, p) = F(m, p) + G[p, m] F(m, m)`` for all rows p > m at once: n/block - 1 stages, each an outer product.

    The same operations as ``sequential`` in the order that exposes their parallelism.
    """

    @staticmethod
    def recursion(gram: Tensor, right: Tensor, block: int) -> Tensor:
        rows, done, found, rest = right.shape[-2], [], [], right
        for start in range(0, rows, block):
            row, rest = rest[..., :block, :], rest[..., block:, :]
            found.append(row)
            if len(found) == TOGETHER:  # each is a view that keeps all of its `rest`
                done.append(torch.cat(found, -2))
                found = []
            if start + block < rows:
                rest = rest + gram[..., start + block :, start : start + block] @ row
        return torch.cat(done + found, -2)
