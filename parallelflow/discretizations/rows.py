"""Rows rescaled and mixed: what a discretisation may do to a driver. Write directions and ties stay.

A number a row goes into the row's coefficient, so that vectors are not copied; a mixture of rows makes new vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from parallelflow.discretizations.base import Phi
from parallelflow.drivers.base import Factor, LowRankDriver, Row


def tensors(driver: LowRankDriver) -> Iterator[Tensor]:
    """All of the driver's tensors, ties as often as they stand in a slot."""
    for row in driver.rows:
        yield row.write
        for factor in (row.read, row.value):
            if factor is not None:
                yield factor.vector
                if factor.coefficient is not None:
                    yield factor.coefficient
    if driver.log_decay is not None:
        yield driver.log_decay


def compute_dtype(driver: LowRankDriver) -> torch.dtype:
    """The widest of the driver's dtypes, at least float32."""
    dtype = torch.float32
    for tensor in tensors(driver):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def value_heads(driver: LowRankDriver) -> int:
    """HV, as far as the driver's own tensors tell."""
    heads = [1 if driver.log_decay is None else driver.log_decay.shape[2]]
    for row in driver.rows:
        axis = row.write.ndim - 2
        heads.append(row.write.shape[axis])
        for factor in (row.read, row.value):
            if factor is not None:
                heads.append(factor.vector.shape[axis])
                if factor.coefficient is not None:
                    heads.append(factor.coefficient.shape[axis])
    return max(heads)


def spread(tensor: Tensor, heads: int, axis: int) -> Tensor:
    """One entry a value head: key head ``h // (HV // H)`` for value head h."""
    count = tensor.shape[axis]
    return tensor if count == heads else tensor.repeat_interleave(heads // count, axis)


def rank_of(row: Row) -> int:
    return row.write.shape[2] if row.write.ndim == 5 else 1


def read_dot_write(row: Row, heads: int, dtype: torch.dtype) -> Tensor:
    """``x = aᵀb`` of a row that reads, ``[B, T, (R,) HV]``; each row with its own write only."""
    assert row.read is not None
    vector, coefficient, sign = row.read
    axis = row.write.ndim - 2
    if coefficient is not None and coefficient.ndim == vector.ndim:  # a number a channel
        read = spread(vector.to(dtype), heads, axis) * spread(coefficient.to(dtype), heads, axis)
        return sign * (read * spread(row.write.to(dtype), heads, axis)).sum(-1)
    common = max(vector.shape[axis], row.write.shape[axis])
    product = spread(vector.to(dtype), common, axis) * spread(row.write.to(dtype), common, axis)
    product = spread(product.sum(-1), heads, axis)
    return sign * (product if coefficient is None else product * spread(coefficient.to(dtype), heads, axis))


def rescaled(row: Row, read: Tensor | None, value: Tensor | None) -> Row:
    """The row with its read and value times numbers ``[B, T, (R,) HV]``; None leaves them.

    Where read and value share a coefficient and both are multiplied by the same tensor, they share the product.
    """
    new_read = row.read if row.read is None or read is None else _times(row.read, read)
    if row.value is None or value is None:
        return Row(row.write, new_read, row.value)
    tied = row.read is not None and row.read.coefficient is row.value.coefficient and read is value
    if tied and new_read is not None and (value.ndim == row.write.ndim - 1):
        return Row(row.write, new_read, row.value._replace(coefficient=new_read.coefficient))
    return Row(row.write, new_read, _times(row.value, value))


def _times(factor: Factor, number: Tensor) -> Factor:
    vector, coefficient, sign = factor
    if coefficient is None:
        return Factor(vector, number, sign)
    axis = vector.ndim - 2
    heads = max(coefficient.shape[axis], number.shape[axis])
    coefficient, number = spread(coefficient, heads, axis), spread(number, heads, axis)
    if number.ndim < coefficient.ndim:
        number = number.unsqueeze(-1)
    elif coefficient.ndim < number.ndim:
        coefficient = coefficient.unsqueeze(-1)
    return Factor(vector, coefficient * number, sign)


class Stack:
    """All rows of a token side by side, coefficients multiplied in, one copy a value head, in the compute dtype.

    ``read`` (A), ``write`` (B) ``[B, T, HV, R, K]``, ``value`` (U) ``[B, T, HV, R, V]`` or None where no row has one.
    A row that only writes has a read of zeros, one without a value a value of zeros.
    """

    def __init__(self, driver: LowRankDriver, heads: int | None = None, dtype: torch.dtype | None = None) -> None:
        heads, dtype = heads or value_heads(driver), dtype or compute_dtype(driver)
        values = [row.value.vector.shape[-1] for row in driver.rows if row.value is not None]

        def stacked(factor: Factor | None, row: Row, width: int) -> Tensor:
            if factor is None:
                axes = (*row.write.shape[:2], heads, rank_of(row), width)
                return row.write.new_zeros(axes, dtype=dtype)
            vector, coefficient, sign = factor
            axis = vector.ndim - 2
            vector = spread(vector.to(dtype), heads, axis)
            if coefficient is not None:
                coefficient = spread(coefficient.to(dtype), heads, axis)
                vector = vector * (coefficient if coefficient.ndim == vector.ndim else coefficient.unsqueeze(-1))
            vector = vector if sign == 1 else -vector
            return vector.unsqueeze(3) if vector.ndim == 4 else vector.transpose(2, 3)

        rows = driver.rows
        width = rows[0].write.shape[-1]
        self.read = torch.cat([stacked(row.read, row, width) for row in rows], 3)
        self.write = torch.cat([stacked(Factor(row.write), row, width) for row in rows], 3)
        self.value = torch.cat([stacked(row.value, row, values[0]) for row in rows], 3) if values else None

    @property
    def product(self) -> Tensor:
        """``X = AᵀB [B, T, HV, R, R]``: row i reads what row j writes."""
        return self.read @ self.write.mT


def mixed(driver: LowRankDriver, stack: Stack, phi: Phi) -> tuple[Row, ...]:
    """Rows that write as before, read ``Φ_a Aᵀ`` and write the values ``Φ_u Uᵀ``, Φ ``[B, T, HV, R, R]``.

    Rows that only write read nothing before and nothing after (their rows of X are zero), and their values are but
    rescaled. New vectors are rounded to the dtype of the old ones.
    """
    read = phi.read @ stack.read
    value = None if stack.value is None else phi.value @ stack.value
    rows, place = [], 0
    for row in driver.rows:
        rank = rank_of(row)
        places = slice(place, place + rank)
        place += rank

        def shaped(vectors: Tensor, row: Row = row, places: slice = places) -> Tensor:
            """``[B, T, HV, R, D]`` in the row's layout and dtype."""
            vectors = vectors[:, :, :, places].to(row.write.dtype)
            return vectors.transpose(2, 3) if row.write.ndim == 5 else vectors.squeeze(3)

        if row.read is not None:
            new_value = None if value is None else Factor(shaped(value))
            rows.append(Row(row.write, Factor(shaped(read)), new_value))
        else:
            number = phi.value.diagonal(dim1=-2, dim2=-1)[..., places]
            number = number.transpose(2, 3) if row.write.ndim == 5 else number.squeeze(3)
            rows.append(rescaled(row, None, number))
    return tuple(rows)
