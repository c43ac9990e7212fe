"""TMA descriptors of the scans' arrays, made and encoded once per (address, shape, tile)."""

import math
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from triton import next_power_of_2
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper

CHUNK = 64
_SWIZZLED_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
_SWIZZLED_PLACES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_NARROW = {  # matrices of fewer than 64 columns
    columns: gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=2) for columns in (16, 32)
}
_FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


class _Address(NamedTuple):
    """The two things a descriptor asks of its base, where it starts and what it holds; and what it has beside, the
    bytes from there to the tensor."""

    address: int
    dtype: torch.dtype
    ahead: int = 0

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

    @property
    def origin(self) -> int:
        """The address of the tensor."""
        return self.base.address + self.base.ahead

    def moved(self, origin: int) -> "Descriptor":
        """The same of a tensor at another address, not encoded."""
        found = copy(self)
        found.base, found.encoded = self.base._replace(address=origin - self.base.ahead), []
        return found


@lru_cache(maxsize=4096)
def _rows(address: int, dtype: torch.dtype, rows: int, columns: int, width: int, height: int) -> Descriptor:
    ahead = height * columns * dtype.itemsize
    start = _Address(address - ahead, dtype, ahead)
    return Descriptor(
        start, [rows + height + 1, height, columns], [columns, columns, 1], [1, height, width], _SWIZZLED_ROWS
    )


def rows(tensor: torch.Tensor, width: int, height: int = CHUNK) -> Descriptor:
    """Chunks of `height` rows of a [rows, columns] view, `width` columns at a time, that can end anywhere.

    The row axis appears twice: coordinates (a, b) name row a + b − height, and b is cut at height.  A chunk with
    `valid` rows in its sequence is addressed as (first + valid, height − valid): rows past the end read as zero and are
    never written, whatever lies there. Of a window of a batch [B, T, …] the rows are those from its first to its last.
    """
    columns = tensor.shape[-1] * tensor.shape[-2]
    own = math.prod(tensor.shape[1:-2])
    count = (tensor.shape[0] - 1) * (tensor.stride(0) // columns) + own
    return _rows(tensor.data_ptr(), tensor.dtype, count, columns, width, height)


@lru_cache(maxsize=4096)
def _places(address: int, dtype: torch.dtype, tokens: int, count: int, columns: int, width: int, height: int,
            ) -> Descriptor:  # fmt: skip
    padded = next_power_of_2(count)
    size, token = height // padded, count * columns
    ahead = size * token * dtype.itemsize
    start = _Address(address - ahead, dtype, ahead)
    return Descriptor(
        start, [tokens + size + 1, size, count, columns], [token, token, columns, 1], [1, size, padded, width],
        _SWIZZLED_PLACES,
    )  # fmt: skip


def places(tensor: torch.Tensor, width: int, height: int) -> Descriptor:
    """Chunks of tokens of [B, T, count, heads, columns] in ``height`` rows, where the count is no power of two.

    A token has as many rows of a tile as the next power of two; those beyond the count read as zero and are never
    written. The coordinates are (a, b, 0, column) as for ``rows``, but in tokens.
    """
    count, columns = tensor.shape[2], tensor.shape[-1] * tensor.shape[-2]
    tokens = tensor.numel() // (count * columns)
    return _places(tensor.data_ptr(), tensor.dtype, tokens, count, columns, width, height)


@lru_cache(maxsize=4096)
def _blocks(address: int, dtype: torch.dtype, count: int, columns: int, height: int, width: int) -> Descriptor:
    layout = _NARROW.get(width, _SWIZZLED)
    return Descriptor(_Address(address, dtype), [count, columns], [columns, 1], [height, width], layout)


def blocks(tensor: torch.Tensor, height: int = CHUNK, width: int | None = None) -> Descriptor:
    """Tiles of `height` rows, `width` columns or all, of an array of matrices, seen as [rows, columns]."""
    columns = tensor.shape[-1]
    width = columns if width is None else width
    return _blocks(tensor.data_ptr(), tensor.dtype, tensor.numel() // columns, columns, height, width)


@lru_cache(maxsize=4096)
def _vectors(address: int, count: int, length: int) -> Descriptor:
    return Descriptor(_Address(address, torch.float32), [count], [1], [length], _FLAT)


def vectors(tensor: torch.Tensor, length: int = CHUNK) -> Descriptor:
    """Runs of `length` float32 of a contiguous array."""
    return _vectors(tensor.data_ptr(), tensor.numel(), length)
