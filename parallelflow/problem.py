"""A driver and a query in the one shape that every backend takes: named tensors and a static description."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallelflow.checks import Memory, expect_floating, expect_rank, expect_shape, fingerprint, show, state_name
from parallelflow.drivers.base import Factor, LowRankDriver, Row


class Inputs(NamedTuple):
    """Everything with a gradient; the same tensor in two slots is a tie.

    ``query [B, T, H, K]``; of the rows that read: ``read``, ``write`` ``[B, T, R, H|HV, K]``, ``read_coefficient``
    ``[B, T, R, H|HV(, K)]``, ``value [B, T, R, H|HV, V]``, ``value_coefficient [B, T, R, H|HV(, V)]``; of the rows that
    only write: ``lone_write``, ``lone_value``, ``lone_coefficient``, likewise; ``log_decay [B, T, HV(, K)]``;
    ``initial_state [N, HV, K, V]``. What a driver lacks is None. A single row may come without its R axis.
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

    def single(self) -> tuple[int, ...]:
        """The slots whose tensors lack the R axis. (A property of a tuple PyTorch 2.9 could not trace.)"""
        slots: tuple[int, ...] = ()
        if self.write is not None and self.write.ndim == 4:
            slots += (1, 2, 3, 4, 5)
        if self.lone_write is not None and self.lone_write.ndim == 4:
            slots += (6, 7, 8)
        return slots

    def each(self, slots: Iterable[int], function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with ``function`` of the tensors in these slots, called once for each: ties stay ties."""
        tensors: list[Tensor | None] = list(self)
        done: list[int] = []
        for slot in slots:
            tensor = self[slot]
            if tensor is None:
                continue
            same = [other for other in done if self[other] is tensor]
            tensors[slot] = tensors[same[0]] if same else function(tensor)
            done.append(slot)
        return Inputs(*tensors)  # type: ignore[arg-type]

    def contiguous(self) -> Inputs:
        """The same, each tensor contiguous."""
        if all(tensor is None or tensor.is_contiguous() for tensor in self):
            return self
        return self.each(range(len(self)), Tensor.contiguous)

    def stacked(self) -> Inputs:
        """The same with the R axis everywhere."""
        return self.each(self.single(), lambda tensor: tensor.unsqueeze(2))

    def unstacked(self, like: Inputs) -> Inputs:
        """The same without the R axes that ``like`` lacks."""
        return self.each(like.single(), lambda tensor: tensor.squeeze(2))


_SLOT = {name: slot for slot, name in enumerate(Inputs._fields)}
TIES = (_SLOT["write"], _SLOT["read"]), (_SLOT["value_coefficient"], _SLOT["read_coefficient"])
"""Slots that may hold the same tensor, by whose identity it is a tie."""


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


AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "hpu", "mps", "mtia", "xla") if torch.amp.is_autocast_available(device)
)
"""Devices that have autocast: asked for once, as PyTorch up to 2.11 cannot trace the question."""


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast makes of a factor of a matrix product: its dtype for float32, else what it is."""
    device = tensor.device.type
    if tensor.dtype != torch.float32 or device not in AUTOCAST:
        return tensor.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A region in which sums and products keep their dtypes."""
    if device.type not in AUTOCAST:
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
    single = inputs.single()
    heads = [inputs.query.shape[2]]
    heads += [t.shape[2 if slot in single else 3] for slot, t in enumerate(inputs[1:9], 1) if t is not None]
    heads += [t.shape[2] for t in inputs[9:10] if t is not None]
    heads += [t.shape[1] for t in inputs[10:] if t is not None]
    values = [t for t in (inputs.value, inputs.lone_value, inputs.initial_state) if t is not None]
    return Sizes(inputs.query.shape[2], max(heads), inputs.query.shape[3], values[0].shape[-1], dtype)


class Problem(NamedTuple):
    """A driver and a query, gathered and checked. ``decided`` is one dictionary, empty at first, for all problems of
    the same shapes, dtypes, devices and structure: what follows from those alone is found once."""

    inputs: Inputs
    traits: Traits
    decided: dict[Any, Any]


_KNOWN: Memory[tuple[Traits, dict[Any, Any]]] = Memory()
_ABSENT = Factor(None)  # type: ignore[arg-type]


def canonical(
    driver: LowRankDriver, query: Tensor, initial_state: Tensor | None, scale: float | None, stored: bool = False
) -> Problem:
    """The driver's rows gathered in two families, those that read and those that only write, and all shapes checked:
    once for each set of shapes, dtypes, devices and ties. A state that is ``stored`` may have 16 bits.

    Raises:
        TypeError, ValueError: for tensors that do not fit together, naming the one at fault.
    """
    if torch.compiler.is_compiling():
        return _examine(driver, query, initial_state, scale, stored)
    key = (stored, scale, driver.signature, *fingerprint(query, initial_state))  # all that checks and traits depend on
    known = _KNOWN.recall(key)
    if known is not None:
        return Problem(_gather(driver, query, initial_state), *known)
    found = _examine(driver, query, initial_state, scale, stored)
    _KNOWN.keep(key, (found.traits, found.decided))
    return found


def _examine(
    driver: LowRankDriver, query: Tensor, initial_state: Tensor | None, scale: float | None, stored: bool
) -> Problem:
    _check_all(driver, query, initial_state, stored)
    inputs = _gather(driver, query, initial_state)
    return Problem(inputs, _describe(driver, inputs, scale), {})


def _families(driver: LowRankDriver) -> tuple[list[Row], list[Row]]:
    """The rows that read, and those that only write."""
    reading = [row for row in driver.rows if row.read is not None]
    return reading, [row for row in driver.rows if row.read is None]


def _check_all(driver: LowRankDriver, query: Tensor, initial_state: Tensor | None, stored: bool) -> None:
    expect_floating("query", query)
    expect_rank("query", query, "[B, T, H, K]", 4)
    batch, time, heads, key_dim = query.shape
    if heads == 0 or key_dim == 0:
        raise ValueError(f"query: got shape {show(query)}, expected at least one head and one channel")
    value_heads, value_dim = _value_shape(driver, heads, initial_state)
    if value_heads % heads:
        raise ValueError(f"value: got {value_heads} heads, expected a multiple of the query's {heads}")
    for row in driver.rows:
        _check(row, query, heads, value_heads, value_dim)
    _check_decay(driver.log_decay, batch, time, value_heads, key_dim)
    if initial_state is not None:
        name = state_name()
        expect_floating(name, initial_state)
        expect_rank(name, initial_state, "[N, HV, K, V]", 4)
        expect_shape(name, initial_state, "[N, HV, K, V]", (initial_state.shape[0], value_heads, key_dim, value_dim))
        kinds = (torch.float32, torch.float64, *((torch.bfloat16,) if stored else ()))
        if initial_state.dtype not in kinds:
            more = "" if stored else " (bfloat16 with in_place or state_indices)"
            raise TypeError(f"{name}: got dtype {initial_state.dtype}, expected float32 or float64{more}")
    for name, tensor in zip(Inputs._fields, _gather(driver, query, initial_state), strict=True):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected the query's, {query.device}")


def _gather(driver: LowRankDriver, query: Tensor, initial_state: Tensor | None) -> Inputs:
    """The rows' factors in their slots."""
    reading, writing = _families(driver)
    if len(driver.rows) == 1:  # nothing to join: the tensors as they are
        row = driver.rows[0]
        parts = (row.write, *(row.value or _ABSENT)[:2])
        if row.read is None:
            return Inputs(query, None, None, None, None, None, *parts, driver.log_decay, initial_state)
        return Inputs(query, *row.read[:2], *parts, None, None, None, driver.log_decay, initial_state)
    value_heads, value_dim = _value_shape(driver, query.shape[2], initial_state)
    read, read_coefficient = _stack([row.read for row in reading], value_heads)
    write, _ = _stack([Factor(row.write) for row in reading], value_heads)
    values = [row.value for row in reading]
    if any(factor is not None for factor in values):  # a row without a value beside rows with one writes zeros
        blank = (value_heads, value_dim)
        values = [row.value or Factor(row.write.new_zeros(*row.write.shape[:-2], *blank)) for row in reading]
    value, value_coefficient = _stack(values, value_heads)
    lone_write, _ = _stack([Factor(row.write) for row in writing], value_heads)
    lone_value, lone_coefficient = _stack([row.value for row in writing], value_heads)
    return Inputs(
        query, read, read_coefficient, write, value, value_coefficient, lone_write, lone_value, lone_coefficient,
        driver.log_decay, initial_state,
    )  # fmt: skip


def _describe(driver: LowRankDriver, inputs: Inputs, scale: float | None) -> Traits:
    reading, writing = _families(driver)
    positions: list[int] = []
    lone_positions: list[int] = []
    place = 0
    for row in driver.rows:
        rank = row.write.shape[2] if row.write.ndim == 5 else 1
        (lone_positions if row.read is None else positions).extend(range(place, place + rank))
        place += rank
    read_sign, value_sign = _sign([row.read for row in reading]), _sign([row.value for row in reading])
    tied = inputs.read is not None and inputs.write is inputs.read and inputs.read_coefficient is not None
    tied = tied and inputs.value_coefficient is inputs.read_coefficient and (read_sign, value_sign) == (-1, 1)
    return Traits(
        sequential=driver.order == "sequential" and driver.rank > 1,
        raw=driver.reads == "raw" and driver.log_decay is not None,
        positions=tuple(positions),
        lone_positions=tuple(lone_positions),
        read_sign=read_sign,
        value_sign=value_sign,
        lone_sign=_sign([row.value for row in writing]),
        tied=tied,
        scale=None if scale is None else float(scale),
    )


def _sign(factors: Sequence[Factor | None]) -> int:
    """A family's sign: that of a lone factor; several have theirs in the coefficients."""
    return factors[0].sign if len(factors) == 1 and factors[0] is not None else 1


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


def _stack(factors: Sequence[Factor | None], value_heads: int) -> tuple[Tensor | None, Tensor | None]:
    """One factor for a family of rows: a single one stays as it is; several are joined along R."""
    present = [factor for factor in factors if factor is not None]
    if not present:
        return None, None
    if len(factors) == 1:
        return present[0].vector, present[0].coefficient

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
    return torch.cat(vectors, 2), None if plain else torch.cat(coefficients, 2)
