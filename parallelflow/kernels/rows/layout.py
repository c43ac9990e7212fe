"""How the rows of a chunk lie, and what the kernels are compiled for.

A token has R reading rows and L rows that only write. Row p of a family is place p % P of token p / P, where P is the
family's count rounded up to a power of two; places beyond the count are empty. A chunk has so many tokens that the
larger family fills a tile of 64 rows (32 where a row is wide).
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from parallelflow.drivers import base
from parallelflow.problem import Inputs, Traits, sizes_of

NO_DECAY, SCALAR_DECAY, VECTOR_DECAY = range(3)
SMALLEST_TILE = 16  # rows of a matrix product
WHOLE, MIDDLE, FINEST = 64, 16, 1  # floors (factors.py): tokens of a block that is centred, 64 for the whole chunk
MOST_CHUNKS = 16  # that a program looks at for strong decays
NARROW = 16  # channels at a time where decays are strong: every block size has factors of its own


class Factor(base.Factor):
    """A driver's factor whose vectors are ``[B, T, R, heads, D]``, and how its coefficient is stored: none (0), one a
    row (1) or one a channel (2)."""

    @property
    def heads(self) -> int:
        return self.vector.shape[-2]

    @property
    def kind(self) -> int:
        if self.coefficient is None:
            return 0
        return 1 if self.coefficient.ndim == self.vector.ndim - 1 else 2

    @property
    def a_row(self) -> bool:
        """Whether it is the vectors, or these times a number a row."""
        return self.kind == 1 or (self.kind == 0 and self.sign == 1)

    @property
    def coefficient_heads(self) -> int:
        if self.coefficient is None:
            return 1
        return self.coefficient.shape[-1 if self.kind == 1 else -2]


def heads_of(tensor: Tensor | None) -> int:
    """Heads of ``[B, T, R, heads, D]``; 1 where there is none."""
    return 1 if tensor is None else tensor.shape[-2]


def width_of(channels: int, most: int) -> int:
    """Columns of a tile of so many channels, at most ``most``."""
    return max(SMALLEST_TILE, min(triton.next_power_of_2(channels), most))


def centred(dtype: torch.dtype) -> float:
    """To what sum of decays, in units of log 2, a block may be centred: its factors, to e^{±half of it}, are rounded to
    ``dtype`` beside rows of any size, and the error of a sum of so many is less than that rounding."""
    return {torch.bfloat16: 144.0, torch.float16: 6.0}.get(dtype, 1.5)


@dataclass(frozen=True)
class Layout:
    """Counts and tiles: ``C`` tokens a chunk, ``R`` reading and ``L`` lone rows a token, in tiles of ``N`` and ``M``
    rows (0: none), ``Q`` rows of queries."""

    C: int
    R: int
    L: int
    heads: int
    value_heads: int
    K: int
    V: int
    decay: int
    raw: bool
    sequential: bool

    @staticmethod
    def of(inputs: Inputs, traits: Traits) -> "Layout":
        sizes = sizes_of(inputs)
        reading, lone = len(traits.positions), len(traits.lone_positions)
        wide = max(sizes.key_dim, sizes.value_dim) * inputs.query.element_size() > 256
        most = triton.next_power_of_2(max(reading, lone))
        decay = NO_DECAY
        if inputs.log_decay is not None:
            decay = SCALAR_DECAY if inputs.log_decay.ndim == 3 else VECTOR_DECAY
        return Layout(
            C=max((32 if wide else 64) // most, 1), R=reading, L=lone, heads=sizes.heads,
            value_heads=sizes.value_heads, K=sizes.key_dim, V=sizes.value_dim, decay=decay, raw=traits.raw,
            sequential=traits.sequential,
        )  # fmt: skip

    def tile(self, rows: int) -> int:
        """Rows of a tile that has ``rows`` places a token."""
        return max(self.C * triton.next_power_of_2(rows), SMALLEST_TILE) if rows else 0

    @property
    def levels(self) -> int:
        """Block sizes at which two tokens of a chunk can part."""
        return self.C.bit_length() - 1

    @property
    def floors(self) -> tuple[int, ...]:
        """What a chunk may need, each with a launch of its own."""
        if self.decay != VECTOR_DECAY:
            return (WHOLE,)
        return (WHOLE, MIDDLE, FINEST) if self.C > MIDDLE else (WHOLE, FINEST)

    @property
    def N(self) -> int:
        return self.tile(self.R)

    @property
    def M(self) -> int:
        return self.tile(self.L)

    @property
    def Q(self) -> int:
        return self.tile(1)
