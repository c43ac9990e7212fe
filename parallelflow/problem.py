"""A driver and a query in the one shape that every backend takes: named tensors and a static description."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.checks import expect_floating, expect_rank, expect_shape, show
from parallelflow.drivers.base import Factor, LowRankDriver, Row


class Inputs(NamedTuple):
    """Everything with a gradient. Rows always have their R axis; the same tensor in two slots is a tie.

    ``query [B, T, H, K]``; of the rows that read: ``read``, ``write`` ``[B, T, R, H|HV, K]``, ``read_coefficient``
    ``[B, T, R, H|HV(, K)]``, ``value [B, T, R, H|HV, V]``, ``value_coefficient [B, T, R, H|HV(, V)]``; of the rows that
    only write: ``lone_write``, ``lone_value``, ``lone_coefficient``, likewise; ``log_decay [B, T, HV(, K)]``;
    ``initial_state [N, HV, K, V]``. What a driver lacks is None.
    """

    query: Tensor
    read: Tensor | None = None
    read_coefficient: Tensor | None = None
    write: Tensor | None = None
    value: Tensor | None = None
    value_coefficient: Tensor | None = None
    lone_write: Tensor | None = None
    lone_value: Tensor | None = None
    lone_coefficient: Tensor | None = None
    log_decay: Tensor | None = None
    initial_state: Tensor | None = None


@dataclass(frozen=True)
class Traits:
    """What a driver is, apart from its sizes: what a kernel is compiled for.

    ``positions`` and ``lone_positions`` are each family's places in the order of a token's rows; ``tied``: reads are
    -β times the writes, beside values times the same β; ``scale`` None is K^-½.
    """

    sequential: bool
    raw: bool
    positions: tuple[int, ...]
    lone_positions: tuple[int, ...]
    read_sign: int
    value_sign: int
    lone_sign: int
    tied: bool
    scale: float | None

    @property
    def rank(self) -> int:
        """R: rows a token, of both families."""
        return len(self.positions) + len(self.lone_positions)


class Sizes(NamedTuple):
    """H, HV, K, V, and the dtype of states and sums: the widest of the inputs', at least float32."""

    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    compute_dtype: torch.dtype


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast makes of a factor of a matrix product: its dtype for float32, else what it is."""
    device = tensor.device.type
    if tensor.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A region in which sums and products keep their dtypes."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def may_read(tensor: Tensor) -> bool:
    """Whether values can be looked at for free: eager, on the CPU, outside function transforms."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def sizes_of(inputs: Inputs) -> Sizes:
    """Read off the tensors."""
    dtype = torch.float32
    for tensor in inputs:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    heads = [inputs.query.shape[2]]
    heads += [t.shape[3] for t in inputs[1:9] if t is not None]
    heads += [t.shape[2] for t in inputs[9:10] if t is not None]
    heads += [t.shape[1] for t in inputs[10:] if t is not None]
    values = [t for t in (inputs.value, inputs.lone_value, inputs.initial_state) if t is not None]
    return Sizes(inputs.query.shape[2], max(heads), inputs.query.shape[3], values[0].shape[-1], dtype)


def canonical(
    driver: LowRankDriver, query: Tensor, initial_state: Tensor | None, scale: float | None
) -> tuple[Inputs, Traits]:
    """The driver's rows gathered in two families, those that read and those that only write, and all shapes checked.

    Raises:
        TypeError, ValueError: for tensors that do not fit together, naming the one at fault.
    """
    expect_floating("query", query)
    expect_rank("query", query, "[B, T, H, K]", 4)
    batch, time, heads, key_dim = query.shape
    if heads == 0 or key_dim == 0:
        raise ValueError(f"query: got shape {show(query)}, expected at least one head and one channel")
    reading: list[Row] = []
    writing: list[Row] = []
    positions: list[int] = []
    lone_positions: list[int] = []
    place = 0
    for row in driver.rows:
        rank = row.write.shape[2] if row.write.ndim == 5 else 1
        places = list(range(place, place + rank))
        place += rank
        if row.read is None:
            writing.append(row)
            lone_positions += places
        else:
            reading.append(row)
            positions += places

    value_heads, value_dim = _value_shape(driver, heads, initial_state)
    if value_heads % heads:
        raise ValueError(f"value: got {value_heads} heads, expected a multiple of the query's {heads}")
    for row in driver.rows:
        _check(row, query, heads, value_heads, value_dim)
    _check_decay(driver.log_decay, batch, time, value_heads, key_dim)
    if initial_state is not None:
        expect_floating("initial_state", initial_state)
        expect_rank("initial_state", initial_state, "[N, HV, K, V]", 4)
        expect_shape(
            "initial_state", initial_state, "[N, HV, K, V]", (initial_state.shape[0], value_heads, key_dim, value_dim)
        )
        if initial_state.dtype.itemsize < 4:
            raise TypeError(f"initial_state: got dtype {initial_state.dtype}, expected float32 or float64")

    read, read_coefficient, read_sign = _stack([row.read for row in reading], value_heads)
    write, _, _ = _stack([Factor(row.write) for row in reading], value_heads)
    if len(reading) == 1 and reading[0].read is not None and reading[0].read.vector is reading[0].write:
        write = read  # one view, so that the tie stays a tie
    values = [row.value for row in reading]
    if any(factor is not None for factor in values):  # a row without a value beside rows with one writes zeros
        blank = (value_heads, value_dim)
        values = [row.value or Factor(row.write.new_zeros(*row.write.shape[:-2], *blank)) for row in reading]
    value, value_coefficient, value_sign = _stack(values, value_heads)
    if len(reading) == 1 and reading[0].read is not None and reading[0].value is not None:
        shared = reading[0].read.coefficient
        if shared is not None and shared is reading[0].value.coefficient:
            value_coefficient = read_coefficient
    tied = read is not None and write is read and read_coefficient is not None
    tied = tied and value_coefficient is read_coefficient and (read_sign, value_sign) == (-1, 1)
    lone_write, _, _ = _stack([Factor(row.write) for row in writing], value_heads)
    lone_value, lone_coefficient, lone_sign = _stack([row.value for row in writing], value_heads)
    inputs = Inputs(
        query, read, read_coefficient, write, value, value_coefficient, lone_write, lone_value, lone_coefficient,
        driver.log_decay, initial_state,
    )  # fmt: skip
    for name, tensor in zip(Inputs._fields, inputs, strict=True):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected the query's, {query.device}")
    traits = Traits(
        sequential=driver.order == "sequential" and driver.rank > 1,
        raw=driver.reads == "raw" and driver.log_decay is not None,
        positions=tuple(positions),
        lone_positions=tuple(lone_positions),
        read_sign=read_sign,
        value_sign=value_sign,
        lone_sign=lone_sign,
        tied=tied,
        scale=None if scale is None else float(scale),
    )
    return inputs, traits


def _value_shape(driver: LowRankDriver, heads: int, initial_state: Tensor | None) -> tuple[int, int]:
    """HV and V: told by the values, or, where no row has one, by the initial state."""
    values = [row.value.vector for row in driver.rows if row.value is not None]
    counts = [heads]
    for row in driver.rows:
        counts.append(row.write.shape[-2])
        for factor in (row.read, row.value):
            if factor is not None:
                counts.append(factor.vector.shape[-2])
                if factor.coefficient is not None:
                    counts.append(factor.coefficient.shape[factor.vector.ndim - 2])
    if values:
        return max(counts), values[0].shape[-1]
    if initial_state is None or initial_state.ndim != 4:
        raise ValueError("initial_state: got none, expected [N, HV, K, V]: no row has a value that would tell V")
    return max(*counts, initial_state.shape[1]), initial_state.shape[-1]


def _check(row: Row, query: Tensor, heads: int, value_heads: int, value_dim: int) -> None:
    batch, time, _, key_dim = query.shape
    tensors = [("write", row.write, key_dim)]
    if row.read is not None:
        tensors.append(("read", row.read.vector, key_dim))
    if row.value is not None:
        tensors.append(("value", row.value.vector, value_dim))
    for name, tensor, width in tensors:
        name = "key" if name != "value" and row.read is not None and row.read.vector is row.write else name
        if tuple(tensor.shape[:2]) != (batch, time):
            raise ValueError(f"{name}: got shape {show(tensor)}, expected the query's [B, T] = [{batch}, {time}] first")
        if tensor.shape[-1] != width:
            letter = "V" if name == "value" else "K, the query's last axis,"
            raise ValueError(f"{name}: got shape {show(tensor)}, expected {letter} = {width} channels")
        if tensor.shape[-2] not in (heads, value_heads):
            expected = f"{heads} heads" if heads == value_heads else f"{heads} key heads or {value_heads} value heads"
            raise ValueError(f"{name}: got shape {show(tensor)} with {tensor.shape[-2]} heads, expected {expected}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected the query's, {query.dtype}")
    for name, factor in (("read coefficient (beta)", row.read), ("value coefficient (beta)", row.value)):
        if factor is not None and factor.coefficient is not None:
            count = factor.coefficient.shape[factor.vector.ndim - 2]
            if count not in (heads, value_heads):
                raise ValueError(
                    f"{name}: got shape {show(factor.coefficient)} with {count} heads, expected {value_heads}"
                )


def _check_decay(log_decay: Tensor | None, batch: int, time: int, value_heads: int, key_dim: int) -> None:
    if log_decay is None:
        return
    if log_decay.ndim == 3:
        expect_shape("log_decay", log_decay, "[B, T, HV]", (batch, time, value_heads))
    else:
        expect_shape("log_decay", log_decay, "[B, T, HV, K]", (batch, time, value_heads, key_dim))


def _stack(factors: Sequence[Factor | None], value_heads: int) -> tuple[Tensor | None, Tensor | None, int]:
    """One factor for a family of rows, with its R axis. One stack stays as it is; several are joined along R."""
    present = [factor for factor in factors if factor is not None]
    if not present:
        return None, None, 1
    if len(factors) == 1:
        vector, coefficient, sign = present[0]
        if vector.ndim == 5:
            return vector, coefficient, sign
        return vector.unsqueeze(2), None if coefficient is None else coefficient.unsqueeze(2), sign

    # Several rows of one kind: joined with their signs in the coefficients.
    channelwise = any(f.coefficient is not None and f.coefficient.ndim == f.vector.ndim for f in present)
    plain = all(f.coefficient is None and f.sign == 1 for f in present)
    vectors, coefficients = [], []
    for vector, coefficient, sign in present:
        if vector.ndim == 4:
            vector = vector.unsqueeze(2)
            coefficient = None if coefficient is None else coefficient.unsqueeze(2)
        vector = vector.repeat_interleave(value_heads // vector.shape[3], 3)
        vectors.append(vector)
        if coefficient is None:
            coefficient = vector.new_ones(vector.shape[:-1])
        coefficient = coefficient.repeat_interleave(value_heads // coefficient.shape[3], 3)
        if channelwise and coefficient.ndim == 4:
            coefficient = coefficient.unsqueeze(-1).expand(vector.shape)
        coefficients.append(coefficient * sign)
    return torch.cat(vectors, 2), None if plain else torch.cat(coefficients, 2), 1
