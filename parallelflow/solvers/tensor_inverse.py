"""tensorInv: the inverse of a unit triangular matrix, as matrix products over all chunks at once."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.solvers.base import Factorisation

BASE = 16  # rows of the blocks inverted by substitution; larger ones are merged by products


class tensor_inverse(Factorisation):
    """``T = (I - G)⁻¹`` formed once, so that every solve is one product.

    Base blocks are inverted by substitution and merged: ``[[A, 0], [-G21, D]]⁻¹ = [[A⁻¹, 0], [D⁻¹ G21 A⁻¹, D⁻¹]]``.
    Stable for correlated keys, unlike products of powers of G (THEORY, section 3).
    """

    def __init__(self, gram: Tensor, block: int) -> None:
        self.inverse = invert_unit_lower(gram)

    def solve(self, right: Tensor) -> Tensor:
        return self.inverse @ right

    def solve_transposed(self, right: Tensor) -> Tensor:
        return self.inverse.transpose(-1, -2) @ right

    def __getitem__(self, index) -> tensor_inverse:
        part = object.__new__(tensor_inverse)
        part.inverse = self.inverse[index]
        return part


def invert_unit_lower(gram: Tensor) -> Tensor:
    """``(I - G)⁻¹`` for strictly lower triangular ``G [..., n, n]``, any n. Entries on and above the diagonal are not
    read."""
    size = gram.shape[-1]
    blocks = 1
    while size > BASE * blocks:
        blocks *= 2
    padded = -(-size // blocks) * blocks
    if padded != size:
        gram = torch.nn.functional.pad(gram, (0, padded - size, 0, padded - size))
    rows = padded // blocks
    batch = gram.shape[:-2]
    tiles = gram.reshape(*batch, blocks, rows, blocks, rows).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    inverse = _substitute(tiles)  # [..., blocks, rows, rows]
    while blocks > 1:
        blocks //= 2
        lower = gram.reshape(*batch, blocks, 2, rows, blocks, 2, rows)[..., 1, :, :, 0, :]
        lower = lower.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # [..., blocks, rows, rows]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        merged = second @ (lower @ first)
        top = torch.nn.functional.pad(first, (0, rows))
        inverse = torch.cat((top, torch.cat((merged, second), -1)), -2)
        rows *= 2
    return inverse.squeeze(-3)[..., :size, :size]


def _substitute(tiles: Tensor) -> Tensor:
    """Inverses of the base blocks, row after row: ``T_p = e_p + Σ_{q<p} G[p,q] T_q``."""
    size = tiles.shape[-1]
    identity = torch.eye(size, dtype=tiles.dtype, device=tiles.device)
    inverse = identity[:1].expand(*tiles.shape[:-2], 1, size)
    for row in range(1, size):
        new = identity[row : row + 1] + tiles[..., row : row + 1, :row] @ inverse
        inverse = torch.cat((inverse, new), -2)
    return inverse
