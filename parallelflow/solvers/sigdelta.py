"""sigDelta: the paper's signature-kernel-like recursion, one anti-diagonal at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.solvers.base import Stepwise


class sigdelta(Stepwise):
    """The grid ``F(m, k) = Z_k + Σ_{i<m} Γ_{k,i} F(i, i)``, whose diagonal is the solution, filled by the recursion

        F(0, k) = Z_k
        F(m, m) = F(m-1, m) + Γ_{m,m-1} F(m-1, m-1)
        F(m, k) = F(m-1, k) + F(m, k-1) - F(m-1, k-1) + (Γ_{k,m-1} - Γ_{k-1,m-1}) F(m-1, m-1),     k > m ≥ 1

    with ``Γ_{k,i}`` the ``block × block`` blocks of G. All cells of an anti-diagonal ``m + k`` are independent, so a
    chunk of C tokens takes 2C - 3 stages. Source: Muca Cirone and Salvi, arXiv 2504.00492, section 3 (sigDelta).
    """

    @staticmethod
    def recursion(gram: Tensor, right: Tensor, block: int) -> Tensor:
        tokens = right.shape[-2] // block
        source = right.unflatten(-2, (tokens, block))
        # Γ as [..., k, i, block, block], and its increments along k.
        blocks = gram.unflatten(-1, (tokens, block)).unflatten(-3, (tokens, block)).transpose(-3, -2)
        jumps = blocks[..., 1:, :, :, :] - blocks[..., :-1, :, :, :]

        diagonal = [source[..., 0, :, :]]  # F(m, m)
        # Anti-diagonal s holds the cells (m, k = s - m) for m = 0 .. s // 2 that lie in the grid, first m in `base`.
        before: tuple[int, Tensor] = (0, source[..., 0:1, :, :])  # s = 0
        if tokens == 1:
            return right
        latest: tuple[int, Tensor] = (0, source[..., 1:2, :, :])  # s = 1
        for total in range(2, 2 * tokens - 1):
            low, high = max(0, total - tokens + 1), total // 2
            cells = []
            if low == 0:
                cells.append(source[..., total : total + 1, :, :])
            first = max(low, 1)
            inner = high if 2 * high != total else high - 1  # the last m with k > m
            if inner >= first:
                rows = torch.arange(first, inner + 1, device=right.device)
                columns_ = total - rows
                solved = torch.stack(diagonal[first - 1 : inner], -3)  # F(m-1, m-1)
                base_l, cells_l = latest
                base_b, cells_b = before
                count = inner - first + 1
                above = cells_l[..., first - 1 - base_l : first - 1 - base_l + count, :, :]  # F(m-1, k)
                left = cells_l[..., first - base_l : first - base_l + count, :, :]  # F(m, k-1)
                corner = cells_b[..., first - 1 - base_b : first - 1 - base_b + count, :, :]  # F(m-1, k-1)
                jump = jumps[..., columns_ - 1, rows - 1, :, :]
                cells.append(above + left - corner + jump @ solved)
            if 2 * high == total and high >= 1:
                base_l, cells_l = latest
                above = cells_l[..., high - 1 - base_l, :, :]
                end = above + blocks[..., high, high - 1, :, :] @ diagonal[high - 1]
                diagonal.append(end)
                cells.append(end.unsqueeze(-3))
            before, latest = latest, (low, torch.cat(cells, -3))
        return torch.stack(diagonal, -3).reshape(right.shape)
