"""The engine's one normal form: a decay and a few low-rank rows a token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from parallelflow.checks import Memory, expect_floating, expect_kind, expect_rank, expect_tensor, fingerprint, show

Order = Literal["simultaneous", "sequential"]
Reads = Literal["decayed", "raw"]


class Factor(NamedTuple):
    """``sign · coefficient · vector``, kept apart: nothing is multiplied into a vector in memory.

    ``vector`` is ``[B, T, H, D]`` or, for a stack of R rows, ``[B, T, R, H, D]``. ``coefficient`` has its leading axes
    and is one number a row ``[B, T, (R,) HV]`` or one a channel ``[B, T, (R,) HV, D]``; None is 1.
    """

    vector: Tensor
    coefficient: Tensor | None = None
    sign: int = 1


@dataclass(frozen=True, eq=False)
class Row:
    """One row ``S ← S + b (aᵀ S + uᵀ)`` of a token's update, or a stack of R of them.

    ``read`` is a (None: the row only writes), ``write`` is b ``[B, T, (R,) H, K]``, ``value`` is u (None: the row only
    transforms the state). The same tensor in two slots is a *tie*, which kernels use.

    Raises:
        TypeError: for a read or value that is no ``Factor``, a write that is no tensor.
    """

    write: Tensor
    read: Factor | None = None
    value: Factor | None = None

    def __post_init__(self) -> None:
        expect_tensor("write", self.write)
        for name, factor in (("read", self.read), ("value", self.value)):
            if factor is not None:
                expect_kind(name, factor, Factor, "a Factor(vector, coefficient) or None")


@dataclass(frozen=True, eq=False)
class LowRankDriver:
    """``S ← diag(e^g) S``, then ``S ← S + Σ_j b_j (a_jᵀ S + u_jᵀ)`` over the rows of the token, for every token.

    Args:
        rows: the rows of a token, in the order of their application when that matters.
        log_decay: g, natural logarithm, ≤ 0 (``-inf`` resets): None, one a head ``[B, T, HV]``, or one a key channel
            ``[B, T, HV, K]``.
        order: ``"simultaneous"``: all rows of a token read the same state; ``"sequential"``: one after another.
        reads: ``"decayed"``: rows read the state after the token's decay; ``"raw"``: before it (RWKV-7, Comba).

    Head axes are H (the query's) or HV value heads; value head h belongs to key head ``h // (HV // H)``.

    Raises:
        ValueError: for shapes that do not fit, and for raw reads of sequential rows, which have no meaning.
        TypeError: for what is not a floating-point tensor.

    Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492), sections 2 and 3.
    """

    rows: tuple[Row, ...]
    log_decay: Tensor | None = None
    order: Order = "simultaneous"
    reads: Reads = "decayed"
    signature: tuple = field(init=False, repr=False, default=())
    """All but the numbers: shapes, dtypes, devices, signs, ties. Drivers of one signature are checked once."""

    def __post_init__(self) -> None:
        expect_kind("rows", self.rows, (tuple, list), "a tuple of Rows")
        for row in self.rows:
            expect_kind("rows", row, Row, "Rows in the tuple")
        object.__setattr__(self, "rows", tuple(self.rows))
        if torch.compiler.is_compiling():
            self._check()
            return
        object.__setattr__(self, "signature", self._sign())
        if not _PASSED.recall(self.signature):
            self._check()
            _PASSED.keep(self.signature, True)

    def _sign(self) -> tuple:
        parts: list[Any] = [self.order, self.reads, *fingerprint(self.log_decay)]
        for row in self.rows:
            write, read, value = row.write, row.read or _ABSENT, row.value or _ABSENT
            parts += row.read is None, row.value is None, read[0] is write, read[1] is value[1], read[2], value[2]
            parts += fingerprint(write, *read[:2], *value[:2])
        return tuple(parts)

    def _check(self) -> None:
        if not self.rows:
            raise ValueError("rows: got none, expected at least one Row")
        for row in self.rows:
            _check_row(row)
        if self.order not in ("simultaneous", "sequential"):
            raise ValueError(f"order: got {self.order!r}, expected 'simultaneous' or 'sequential'")
        if self.reads not in ("decayed", "raw"):
            raise ValueError(f"reads: got {self.reads!r}, expected 'decayed' or 'raw'")
        if self.log_decay is not None:
            expect_floating("log_decay", self.log_decay)
            expect_rank("log_decay", self.log_decay, "[B, T, HV] or [B, T, HV, K]", 3, 4)
        if self.reads == "raw" and self.order == "sequential" and self.rank > 1:
            raise ValueError(
                "reads: got 'raw' with order='sequential' and more than one row a token, which has no meaning; "
                "expected reads='decayed' or order='simultaneous'"
            )

    @property
    def rank(self) -> int:
        """R: the number of rows a token."""
        return sum(row.write.shape[2] if row.write.ndim == 5 else 1 for row in self.rows)


_PASSED: Memory[bool] = Memory()
_ABSENT = Factor(None)  # type: ignore[arg-type]


def _check_row(row: Row) -> None:
    expect_floating("write", row.write)
    expect_rank("write", row.write, "[B, T, H, K] or [B, T, R, H, K]", 4, 5)
    if row.read is None and row.value is None:
        raise ValueError("rows: got a Row with neither read nor value, which does nothing")
    for name, factor in (("read", row.read), ("value", row.value)):
        if factor is None:
            continue
        vector, coefficient, sign = factor
        expect_floating(name, vector)
        if vector.ndim != row.write.ndim or vector.shape[:-2] != row.write.shape[:-2]:
            raise ValueError(
                f"{name}: got shape {show(vector)}, expected the leading axes of write, {show(row.write)}, "
                "then heads and channels"
            )
        if name == "read" and vector.shape[-1] != row.write.shape[-1]:
            raise ValueError(f"read: got shape {show(vector)}, expected write's K = {row.write.shape[-1]} channels")
        if sign not in (1, -1):
            raise ValueError(f"{name}: got sign {sign!r}, expected 1 or -1")
        if coefficient is not None:
            expect_floating(f"{name} coefficient", coefficient)
            leading = tuple(vector.shape[:-2])
            fits = coefficient.ndim in (vector.ndim - 1, vector.ndim)
            fits = fits and tuple(coefficient.shape[: len(leading)]) == leading
            if fits and coefficient.ndim == vector.ndim:
                fits = coefficient.shape[-1] == vector.shape[-1]
            if not fits:
                raise ValueError(
                    f"{name} coefficient: got shape {show(coefficient)}, expected one number a row "
                    f"{[*leading, 'HV']} or one a channel {[*leading, 'HV', vector.shape[-1]]}"
                )
