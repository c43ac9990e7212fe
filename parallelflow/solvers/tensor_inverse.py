"""tensorInv: the inverse of a unit triangular matrix, as matrix products over all chunks at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallelflow.solvers.base import Factorisation

BASE = 32  # rows of the blocks inverted by substitution; larger ones are merged by products


class tensor_inverse(Factorisation):
    """``T = (I - G)⁻¹`` formed once, so that every solve is one product.

    Base blocks are inverted by substitution and merged: ``[[A, 0], [-G21, D]]⁻¹ = [[A⁻¹, 0], [D⁻¹ G21 A⁻¹, D⁻¹]]``.
    Stable for correlated keys, unlike products of powers of G.
    Source: Muca Cirone and Salvi, arXiv 2504.00492, section 3 (tensorInv); for R = 1 the WY form of Yang, Wang, Zhang,
    Shen and Kim 2024, arXiv 2406.06484.
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

    def growth(self) -> Tensor:
        """``max(‖T‖∞, ‖T‖₁)`` of every chunk: how much of its rounding G can pass on to a solution."""
        sizes = self.inverse.abs()
        return torch.maximum(sizes.sum(-1).amax(-1), sizes.sum(-2).amax(-1))


def invert_unit_lower(gram: Tensor) -> Tensor:
    """``(I - G)⁻¹`` for strictly lower triangular ``G [..., n, n]``, any n. Entries on and above the diagonal are not
    read."""
    return _Inverse.apply(gram)


class _Inverse(torch.autograd.Function):
    """Its adjoint needs nothing but the result: ``dG = tril(Tᵀ dT Tᵀ, -1)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor) -> Tensor:
        size = gram.shape[-1]
        blocks = 1
        while size > BASE * blocks:
            blocks *= 2
        rows = -(-size // blocks)
        missing = blocks * rows - size
        if missing:
            gram = torch.nn.functional.pad(gram, (0, missing, 0, missing))
        inverse = _substitute(_diagonal(gram, blocks, 0))  # [..., blocks, rows, rows]
        while blocks > 1:
            blocks //= 2
            first, second = inverse[..., 0::2, :, :].contiguous(), inverse[..., 1::2, :, :].contiguous()
            inverse = gram.new_zeros(*gram.shape[:-2], blocks, 2 * rows, 2 * rows)
            inverse[..., :rows, :rows] = first
            inverse[..., rows:, rows:] = second
            inverse[..., rows:, :rows] = second @ (_diagonal(gram, blocks, 1).contiguous() @ first)
            rows *= 2
        return inverse.squeeze(-3)[..., :size, :size]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return (transposed @ gradient @ transposed).tril(-1)


def _diagonal(gram: Tensor, blocks: int, half: int) -> Tensor:
    """The diagonal blocks ``[..., blocks, s, s]``, or (``half``: 1) the lower left quarter of each."""
    if half:
        parts = (blocks, 2, -1)
        tiles = gram.unflatten(-2, parts).unflatten(-1, parts)[..., 1, :, :, 0, :]
    else:
        tiles = gram.unflatten(-2, (blocks, -1)).unflatten(-1, (blocks, -1))
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _substitute(tiles: Tensor) -> Tensor:
    """Inverses of unit lower triangular tiles ``[..., s, s]`` by right-looking substitution, all tiles in the innermost
    axis: ``T_p += G[p,q] T_q`` for all p > q, q after q."""
    size = tiles.shape[-1]
    gram = tiles.reshape(-1, size, size).permute(1, 2, 0).contiguous()
    inverse = torch.zeros_like(gram)
    inverse.diagonal(dim1=0, dim2=1).fill_(1)
    for row in range(size - 1):
        inverse[row + 1 :, : row + 1].addcmul_(gram[row + 1 :, row, None], inverse[row, None, : row + 1])
    return inverse.permute(2, 0, 1).reshape(tiles.shape)
