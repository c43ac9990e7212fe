"""TMA descriptors of the scans' arrays, made and encoded once per (address, shape, tile)."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper

CHUNK = 64
_SWIZZLED_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


class _Address(NamedTuple):
    """The two things a descriptor asks of its base: where it starts and what it holds."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class Descriptor(hopper.TensorDescriptor):
    """Triton's descriptor, with the form in which ``launch`` hands it to a kernel and what that kernel depends on.

    A training step asks the allocator for the same sizes in the same order, so that addresses recur and an encoded
    descriptor serves again.
    """

    encoded: list[Any]
    kind: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoded = []
        self.kind = f"{self.base.dtype} {self.block_shape} {self.layout}"


@lru_cache(maxsize=4096)
def _rows(address: int, dtype: torch.dtype, rows: int, columns: int, width: int) -> Descriptor:
    start = _Address(address - CHUNK * columns * dtype.itemsize, dtype)
    return Descriptor(
        start, [rows + CHUNK + 1, CHUNK, columns], [columns, columns, 1], [1, CHUNK, width], _SWIZZLED_ROWS
    )


def rows(tensor: torch.Tensor, width: int) -> Descriptor:
    """Chunks of 64 rows of a [rows, columns] view, `width` columns at a time, that can end anywhere.

    The row axis appears twice: coordinates (a, b) name row a + b − 64, and b is cut at 64.  A chunk with `valid` rows
    in its sequence is addressed as (first + valid, 64 − valid): rows past the end read as zero and are never written,
    whatever lies there.  Of a window of a batch [B, T, heads, size] the rows are those from its first to its last.
    """
    columns = tensor.shape[-1] * tensor.shape[-2]
    count = (tensor.shape[0] - 1) * (tensor.stride(0) // columns) + tensor.shape[1]
    return _rows(tensor.data_ptr(), tensor.dtype, count, columns, width)


@lru_cache(maxsize=4096)
def _blocks(address: int, dtype: torch.dtype, count: int, columns: int) -> Descriptor:
    return Descriptor(_Address(address, dtype), [count, columns], [columns, 1], [CHUNK, columns], _SWIZZLED)


def blocks(tensor: torch.Tensor) -> Descriptor:
    """Tiles of 64 whole rows of an array of matrices, seen as [rows, columns]."""
    columns = tensor.shape[-1]
    return _blocks(tensor.data_ptr(), tensor.dtype, tensor.numel() // columns, columns)


@lru_cache(maxsize=4096)
def _vectors(address: int, count: int) -> Descriptor:
    return Descriptor(_Address(address, torch.float32), [count], [1], [CHUNK], _FLAT)


def vectors(tensor: torch.Tensor) -> Descriptor:
    """Runs of 64 float32 of a contiguous array."""
    return _vectors(tensor.data_ptr(), tensor.numel())
