"""The blocked inverse as Triton kernels on the solvers' interface, to be timed beside the CUDA kernels of the others.

``factor`` inverts the diagonal blocks of up to 64 rows, with the device functions of the library's own preparation;
``solve`` is one product a block, on tensor cores, after the products with the solutions of the blocks before. Float32
systems take three TF32 passes; with 16-bit right sides the inverse is rounded to their dtype and so are the products'
operands, as in the library's scans.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallelflow.kernels.prepare import assemble, corner, invert_base
from parallelflow.kernels.products import float32_precision
from parallelflow.solvers import Factorisation

TILE = 64  # columns of a program


@triton.jit
def entries(gram, row, column, n):
    """G at rows and columns, 0 outside."""
    inside = (row < n) & (column < n)
    return tl.load(gram + row * n + column, mask=inside, other=0.0)


@triton.jit
def place(inverse, block, row, column, B: tl.constexpr):
    """Stores a quarter of a block of B rows, with its corner at (row, column)."""
    i = tl.arange(0, block.shape[0])
    tl.store(inverse + (row + i)[:, None] * B + (column + i)[None, :], block.to(inverse.dtype.element_ty))


@triton.jit
def invert_kernel(gram, inverse, n, BLOCKS: tl.constexpr, B: tl.constexpr, SPLIT: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """(I - G)^-1 of one diagonal block."""
    flat = tl.program_id(0).to(tl.int64)
    gram += flat // BLOCKS * n * n
    inverse += flat * B * B
    first = (flat % BLOCKS * B).to(tl.int32)
    i = tl.arange(0, 16)
    base = first + tl.arange(0, B // 16)[:, None, None] * 16
    x = invert_base(-entries(gram, base + i[None, :, None], base + i[None, None, :], n), SPLIT, PRECISION)
    if B == 64:
        pair = first + tl.arange(0, 2)[:, None, None] * 32
        blocks = -entries(gram, pair + 16 + i[None, :, None], pair + i[None, None, :], n)
        upper, lower = tl.split(tl.permute(tl.reshape(x, [2, 2, 16, 16]), (0, 2, 3, 1)))
        x = assemble(upper, lower, corner(upper, lower, blocks, SPLIT, PRECISION))
    if B > 16:
        half: tl.constexpr = B // 2
        j = first + tl.arange(0, half)
        blocks = -entries(gram, j[:, None] + half, j[None, :], n)
        upper, lower = tl.split(tl.permute(x, (1, 2, 0)))
        place(inverse, upper, 0, 0, B)
        place(inverse, tl.zeros_like(upper), 0, half, B)
        place(inverse, lower, half, half, B)
        place(inverse, corner(upper, lower, blocks, SPLIT, PRECISION), half, 0, B)
    else:
        place(inverse, tl.reshape(x, [16, 16]), 0, 0, B)


@triton.jit
def solve_kernel(gram, inverse, right, solution, n, columns, BLOCKS: tl.constexpr, B: tl.constexpr,
                 BD: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of columns of one system; a block's solution is read again from where it was stored."""
    tiles = tl.cdiv(columns, BD)
    flat = tl.program_id(0).to(tl.int64)
    system = flat // tiles
    gram += system * n * n
    inverse += system * BLOCKS * B * B
    right += system * n * columns
    solution += system * n * columns
    DTYPE: tl.constexpr = right.dtype.element_ty
    column = (flat % tiles * BD).to(tl.int32) + tl.arange(0, BD)
    i = tl.arange(0, B)
    for turn in tl.static_range(BLOCKS):
        own = BLOCKS - 1 - turn if TRANSPOSED else turn
        row = own * B + i
        inside = (row < n)[:, None] & (column < columns)[None, :]
        place_ = row[:, None] * columns + column[None, :]
        z = tl.load(right + place_, mask=inside, other=0.0).to(tl.float32)
        for before in tl.static_range(turn):
            far = (BLOCKS - 1 - before if TRANSPOSED else before) * B + i
            known = tl.load(solution + far[:, None] * columns + column[None, :],
                            mask=(far < n)[:, None] & (column < columns)[None, :], other=0.0)  # fmt: skip
            if TRANSPOSED:
                met = tl.trans(entries(gram, far[:, None], row[None, :], n))
            else:
                met = entries(gram, row[:, None], far[None, :], n)
            z += tl.dot(met.to(DTYPE), known, input_precision=PRECISION)
        block = tl.load(inverse + own * B * B + i[:, None] * B + i[None, :])
        if TRANSPOSED:
            block = tl.trans(block)
        x = tl.dot(block, z.to(DTYPE), input_precision=PRECISION)
        tl.store(solution + place_, x.to(DTYPE), mask=inside)
        if turn + 1 < BLOCKS:
            tl.debug_barrier()


class BlockedInverse(Factorisation):
    """``gram [..., n, n]`` float32; right sides of one dtype, which the inverse is kept in."""

    def __init__(self, gram: Tensor, dtype: torch.dtype) -> None:
        self.gram, self.dtype, rows = gram.contiguous(), dtype, gram.shape[-1]
        self.size = max(16, min(64, triton.next_power_of_2(rows)))
        self.blocks, self.precision = -(-rows // self.size), float32_precision(gram.device)
        systems = gram.numel() // rows**2
        self.inverse = gram.new_empty(systems, self.blocks, self.size, self.size, dtype=dtype)
        invert_kernel[(systems * self.blocks,)](
            self.gram, self.inverse, rows, BLOCKS=self.blocks, B=self.size, SPLIT=dtype != torch.float32,
            PRECISION=self.precision, num_warps=1, num_stages=1,
        )  # fmt: skip

    def solve(self, right: Tensor) -> Tensor:
        return self._solve(right, False)

    def solve_transposed(self, right: Tensor) -> Tensor:
        return self._solve(right, True)

    def __getitem__(self, index: slice | Tensor) -> Factorisation:
        return BlockedInverse(self.gram[index], self.dtype)

    def _solve(self, right: Tensor, transposed: bool) -> Tensor:
        solution, (rows, columns) = torch.empty_like(right), right.shape[-2:]
        programs = right.numel() // (rows * columns) * triton.cdiv(columns, TILE)
        solve_kernel[(programs,)](
            self.gram, self.inverse, right, solution, rows, columns, BLOCKS=self.blocks, B=self.size, BD=TILE,
            TRANSPOSED=transposed, PRECISION=self.precision, num_warps=4, num_stages=1,
        )  # fmt: skip
        return solution
