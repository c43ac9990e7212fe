"""Exceptions that name the argument, what came, and what is expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import suppress
from contextvars import ContextVar
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

one_token: ContextVar[bool] = ContextVar("one_token", default=False)
"""Set where tensors were given without their time axis, and the initial state as ``state``: messages say it so."""


def state_name() -> str:
    """What the caller knows the initial state by."""
    return "state" if not torch.compiler.is_compiling() and one_token.get() else "initial_state"


def show(tensor: Tensor) -> str:
    """A tensor's shape, as it is written in messages."""
    return str(list(tensor.shape))


def fingerprint(*tensors: Tensor | None) -> list[object]:
    """What checks of shapes look at, in a form that can be compared and hashed."""
    return [(t.shape, t.dtype, t.device, t.layout) if isinstance(t, Tensor) else type(t) for t in tensors]


class Memory(Generic[T]):
    """What was found for a few thousand keys; what cannot be hashed (sizes that are symbols) is not remembered."""

    def __init__(self) -> None:
        self._found: dict[object, T] = {}

    def recall(self, key: object) -> T | None:
        """What was kept for this key."""
        try:
            return self._found.get(key)
        except TypeError:
            return None

    def keep(self, key: object, found: T) -> None:
        """To be recalled."""
        if len(self._found) >= 4096:
            self._found.clear()
        with suppress(TypeError):
            self._found[key] = found


def expect_tensor(name: str, value: object) -> None:
    """TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def expect_kind(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """TypeError unless ``value`` is of this class, or of one of these."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")


def expect_floating(name: str, value: object) -> None:
    """TypeError unless ``value`` is a dense tensor of a floating-point dtype."""
    expect_tensor(name, value)
    assert isinstance(value, Tensor)
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected float16, bfloat16, float32 or float64")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected a dense tensor, torch.strided")


def expect_rank(name: str, value: Tensor, layout: str, *ranks: int) -> None:
    """ValueError unless the tensor has one of these numbers of axes."""
    if value.ndim not in ranks:
        raise ValueError(f"{name}: got shape {show(value)} with {value.ndim} axes, expected {layout}")


def expect_shape(name: str, value: Tensor, layout: str, shape: Iterable[int]) -> None:
    """ValueError unless the tensor has exactly this shape."""
    expected = list(shape)
    if list(value.shape) != expected:
        raise ValueError(f"{name}: got shape {show(value)}, expected {layout} = {expected}")


def expect_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """ValueError unless ``value`` is one of the choices."""
    choices = list(choices)
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: got {value!r}, expected one of {known}{nearest(value, choices)}")


def expect_flag(name: str, value: object) -> None:
    """TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def nearest(word: object, choices: Iterable[str]) -> str:
    """'; did you mean …?' where one of the choices is close, else nothing."""
    close = difflib.get_close_matches(str(word), list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def expect_number(name: str, value: object) -> None:
    """TypeError unless ``value`` is a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: got {value!r}, expected a number")


def expect_positive_number(name: str, value: object) -> None:
    """TypeError or ValueError unless ``value`` is a finite real number > 0."""
    expect_number(name, value)
    if not 0 < value < float("inf"):  # type: ignore[operator]
        raise ValueError(f"{name}: got {value}, expected a positive number")


def expect_positive_integer(name: str, value: object) -> None:
    """TypeError or ValueError unless ``value`` is an int ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {value!r}, expected a positive integer")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected a positive integer")


def device_of(device: torch.device | str) -> torch.device:
    """The device of that name; ValueError for one that is not there."""
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device: got {str(device)!r}, expected one that is here: {why}") from None


def expect_offsets(cu_seqlens: object, cu_seqlens_cpu: object, line: Tensor) -> None:
    """TypeError or ValueError unless these can be the offsets ``[N + 1]`` of sequences packed on a line ``[1, T, …]``,
    and the same on the host (or None). Their numbers are not looked at: ``expect_starts``."""
    for name, tensor in (("cu_seqlens", cu_seqlens), ("cu_seqlens_cpu", cu_seqlens_cpu)):
        if tensor is None and name == "cu_seqlens_cpu":
            continue
        expect_tensor(name, tensor)
        assert isinstance(tensor, Tensor)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected int32 or int64")
        if tensor.ndim != 1 or tensor.shape[0] < 2:
            raise ValueError(f"{name}: got shape {show(tensor)}, expected [N + 1], at least 2 numbers")
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.device != line.device and cu_seqlens.device.type != "cpu":
        raise ValueError(f"cu_seqlens: got device {cu_seqlens.device}, expected the tokens', {line.device}, or cpu")
    if isinstance(cu_seqlens_cpu, Tensor):
        if cu_seqlens_cpu.device.type != "cpu":
            raise ValueError(f"cu_seqlens_cpu: got device {cu_seqlens_cpu.device}, expected cpu")
        if cu_seqlens_cpu.shape != cu_seqlens.shape:
            raise ValueError(
                f"cu_seqlens_cpu: got shape {show(cu_seqlens_cpu)}, expected that of cu_seqlens, {show(cu_seqlens)}"
            )
    if line.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens: got one with a batch of {line.shape[0]}, expected packed sequences in a batch of 1"
        )


def expect_starts(starts: list[int], time: int) -> None:
    """ValueError unless these numbers are offsets of sequences on a line of ``time`` tokens."""
    if starts[0] != 0 or starts[-1] != time or any(last < first for first, last in pairwise(starts)):
        raise ValueError(f"cu_seqlens: got {brief(starts)}, expected numbers that never decrease from 0 to T = {time}")


def brief(numbers: list[int]) -> str:
    """As they are written in messages."""
    return str(numbers) if len(numbers) <= 12 else f"[{', '.join(map(str, numbers[:8]))}, … {numbers[-1]}]"


def check_layouts(**tensors: tuple[Tensor | None, str]) -> None:
    """Every tensor against its layout, such as ``"B T H K"``: a letter stands for one size throughout, bound where it
    is first met; ``"H|HV"`` is either; a layout that ends in ``"?"`` may be absent (None). All on the first one's
    device.

    Raises:
        TypeError: for what is not a floating-point tensor.
        ValueError: for a wrong number of axes, a size or a device that differs, naming the argument.
    """
    if torch.compiler.is_compiling():
        _check_layouts(tensors)
        return
    key = (tuple(tensors), *[(pair[1], *fingerprint(pair[0])) for pair in tensors.values()])
    if not _PASSED.recall(key):
        _check_layouts(tensors)
        _PASSED.keep(key, True)


_PASSED: Memory[bool] = Memory()


def _check_layouts(tensors: dict[str, tuple[Tensor | None, str]]) -> None:
    sizes: dict[str, int] = {}
    first = ""
    device = None
    for name, (tensor, layout) in tensors.items():
        if tensor is None and layout.endswith("?"):
            continue
        expect_floating(name, tensor)
        assert tensor is not None
        letters = layout.removesuffix("?").split()
        if tensor.ndim != len(letters):
            came, shown = _as_given(tensor, letters)
            raise ValueError(f"{name}: got shape {came} with {len(came)} axes, expected {shown}")
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, expected the {first}'s, {device}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            choices = letter.split("|")
            if len(choices) == 1:
                sizes.setdefault(letter, size)
            if size not in [sizes[choice] for choice in choices]:
                came, shown = _as_given(tensor, letters)
                expected = ", ".join(str(sizes.get(each, each)) for each in shown[1:-1].split(", "))
                raise ValueError(f"{name}: got shape {came}, expected {shown} = [{expected}]")
    heads, value_heads = sizes.get("H"), sizes.get("HV")
    if heads is not None and value_heads is not None and heads and value_heads % heads:
        raise ValueError(f"value: got {value_heads} heads, expected a multiple of the query's {heads}")


def _as_given(tensor: Tensor, letters: list[str]) -> tuple[list[int], str]:
    """Shape and layout as the caller has them: a step's tensors have no time axis."""
    shape = list(tensor.shape)
    if one_token.get() and "T" in letters:
        shape, letters = shape[:1] + shape[2:], [letter for letter in letters if letter != "T"]
    return shape, f"[{', '.join(letters)}]"
