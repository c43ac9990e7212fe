"""tensorInv: the inverse of a unit triangular matrix, as matrix products over all chunks at once."""

from __future__ import annotations

from typing import Any

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
        self.dtype = gram.dtype

    def solve(self, right: Tensor) -> Tensor:
        return self.inverse @ right

    def solve_transposed(self, right: Tensor) -> Tensor:
        return self.inverse.transpose(-1, -2) @ right

    def __getitem__(self, index: slice | Tensor) -> tensor_inverse:
        part = object.__new__(tensor_inverse)
        part.inverse, part.dtype = self.inverse[index], self.dtype
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
    inverse = _Tiles.apply(tiles)  # [..., blocks, rows, rows]
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


class _Tiles(torch.autograd.Function):
    """Inverses of the base blocks ``[..., s, s]`` by right-looking substitution, all blocks in the innermost axis:
    ``T_p += G[p,q] T_q`` for all p > q, q after q."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tiles: Tensor) -> Tensor:
        size = tiles.shape[-1]
        gram = tiles.reshape(-1, size, size).permute(1, 2, 0).contiguous()
        inverse = torch.zeros_like(gram)
        inverse.diagonal(dim1=0, dim2=1).fill_(1)
        for row in range(size - 1):
            inverse[row + 1 :, : row + 1].addcmul_(gram[row + 1 :, row, None], inverse[row, None, : row + 1])
        return inverse.permute(2, 0, 1).reshape(tiles.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """``dG = tril(Tᵀ dT Tᵀ, -1)``."""
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return (transposed @ gradient @ transposed).tril(-1)
