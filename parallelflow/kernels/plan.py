"""A pass that is watched once, and then made again: one piece of memory for all its arrays, and its launches.

Stages are written as plain functions that ask PyTorch for memory and launch kernels. What they ask for and launch
follows from shapes, dtypes and options alone. So the second pass of a kind is watched: every array's size and lifetime,
every launch's arguments. Later ones take two pieces of memory from the allocator (what is kept for a backward pass, and
all else, in which arrays lie where others have ended), make the results, and launch. A pass that does anything else on
the way, such as a sum by PyTorch, is never made again but computed each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from .recording import ALIGNMENT, Device, Encoded, Place, Recorder, Step, Template, record
from .watch import Again

APART = 256  # bytes: arrays begin at multiples of it
aten = torch.ops.aten
VACANT = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip
_address = Tensor.data_ptr
Passed = tuple[Sequence[Tensor | None], list[Tensor]]
"""What a pass makes: its results, and what a backward pass starts from."""


class Made:
    """An array that a pass made: how many bytes, and between which of its launches it lived."""

    def __init__(self, tensor: Tensor, begin: int) -> None:
        self.bytes, self.begin, self.end = tensor.numel() * tensor.element_size(), begin, begin
        self.address, self.memory = tensor.data_ptr(), StorageWeakRef(tensor.untyped_storage())


class Watch(TorchDispatchMode):
    """Sees what is allocated, for a recorder; its numbers begin at ``first``."""

    def __init__(self, recorder: Recorder, first: int) -> None:
        super().__init__()
        self.recorder, self.first = recorder, first
        self.made: list[Made] = []
        self.living: dict[int, Made] = {}
        recorder.before = self.look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in VACANT:
            self.look()
            number = self.first + len(self.made)
            self.made.append(Made(found, len(self.recorder.steps)))
            self.living[number] = self.made[-1]
            self.recorder.enter(number, found)
        elif func._schema.is_mutable or (isinstance(found, Tensor | list | tuple) and not func.is_view):
            self.recorder.complete = False
        return found

    def look(self) -> None:
        """Which arrays have ended."""
        for number, made in [*self.living.items()]:
            made.end = len(self.recorder.steps)
            if made.memory.expired():
                del self.living[number]
                self.recorder.regions.pop(number, None)

    def number_of(self, tensor: Tensor) -> int | None:
        """Of an array, all of it."""
        for number, made in self.living.items():
            if made.address == tensor.data_ptr() and made.bytes == tensor.numel() * tensor.element_size():
                return number
        return None


def memory(size: int, device: torch.device) -> Tensor:
    """So many bytes, uninitialised."""
    return torch.empty(size, dtype=torch.uint8, device=device)


class Vacant(NamedTuple):
    """An array to be made: like one of the tensors given, by its place, or of a shape and dtype of its own."""

    like: int | None
    shape: torch.Size
    dtype: torch.dtype

    def make(self, given: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """Uninitialised."""
        if self.like is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.empty_like(given[self.like])  # type: ignore[arg-type]  # a fifth less on the host


class Plan(NamedTuple):
    """How a pass is made again. Its template's tensors are those given, the results, what is kept, and the rest;
    ``tables`` it only holds."""

    template: Template
    results: tuple[Vacant | None, ...]
    kept: tuple[tuple[int, torch.Size, torch.dtype], ...]
    kept_bytes: int
    scratch_bytes: int
    device: torch.device
    launched_on: Device
    tables: list[Tensor]

    def opened(self, kept: list[Tensor]) -> list[Tensor]:
        """The arrays that were kept, if they came in one piece."""
        if len(kept) != 1 or kept[0].dtype != torch.uint8:
            return kept
        (space,) = kept
        return [
            space[begin : begin + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for begin, shape, dtype in self.kept
        ]


class Pass:
    """A pass of problems of one kind: same shapes, dtypes, devices, options, and the same tables, which are what it
    reads beside the tensors it is given."""

    TRIES = 4
    LARGEST = 256  # sets of addresses

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.calls = 0
        self.found: dict[tuple[int, ...], list[Step]] = {}

    def run(self, given: Sequence[Tensor | None], compute: Callable[[], Passed]) -> Passed:
        """What ``compute()`` returns: results, contiguous ones, and what is kept, which may come in one piece (see
        ``Plan.opened``). ``given`` are all the tensors it reads, contiguous, or None."""
        found = self.again(given)
        if found is not None:
            return found
        self.calls += 1
        if self.plan is not None or not 1 < self.calls <= 1 + self.TRIES or _get_current_dispatch_mode_stack():
            return compute()
        return self._watched(given, compute)

    def again(self, given: Sequence[Tensor | None]) -> Passed | None:
        """The pass made again; None, and nothing done, where that cannot be."""
        plan = self.plan
        if plan is None:
            return None
        results = [None if each is None else each.make(given, plan.device) for each in plan.results]
        kept = memory(plan.kept_bytes, plan.device) if plan.kept_bytes else None
        if not self.into((*given, *results, kept)):
            return None
        return results, [] if kept is None else [kept]

    def into(self, tensors: Sequence[Tensor | None]) -> bool:
        """The pass made again on the tensors given, for results and for what is kept; False, and nothing done, where
        that cannot be."""
        plan = self.plan
        if plan is None:
            return False
        scratch = memory(plan.scratch_bytes, plan.device) if plan.scratch_bytes else None
        key = tuple([0 if each is None else _address(each) for each in (*tensors, scratch)])
        steps = self.found.get(key)
        if steps is None:
            if reduce(or_, key) % ALIGNMENT:
                return False
            if len(self.found) >= self.LARGEST:
                self.found.clear()
            steps = self.found[key] = plan.template.at(key)
        return plan.launched_on.take(steps)

    def settle(self, places: tuple[int, ...], checking: bool) -> Again:
        """See ``watch.Launched``: its tensors are those given and two results."""
        absent = max(places) + 1
        order = itemgetter(*[absent if place < 0 else place for place in places])
        return lambda tensors: self.into((*order((*tensors, None)), None))

    def _watched(self, given: Sequence[Tensor | None], compute: Callable[[], Passed]) -> Passed:
        recorder = Recorder(given)
        with Watch(recorder, len(given)) as watch:
            results, kept = record(recorder, compute)
            watch.look()
        if recorder.complete and recorder.apart:
            self.plan = _plan(recorder, watch, given, results, kept)
        return results, kept


def _plan(
    recorder: Recorder,
    watch: Watch,
    given: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    kept: list[Tensor],
) -> Plan | None:
    """None where a result is not all of an array of its own."""
    count = len(given)
    to: dict[int, Place] = {number: Place(number, 0) for number in range(count)}
    vacant: list[Vacant | None] = []
    for place, result in enumerate(results):
        if result is None:
            vacant.append(None)
            continue
        number = watch.number_of(result)
        if number is None or number in to or not result.is_contiguous():
            return None
        to[number] = Place(count + place, 0)
        like = [
            at
            for at, tensor in enumerate(given)
            if tensor is not None and (tensor.shape, tensor.dtype) == (result.shape, result.dtype)
        ]
        vacant.append(Vacant(like[0] if like else None, result.shape, result.dtype))
    size, shown = 0, []
    for tensor in kept:
        number = watch.number_of(tensor)
        if number is None or number in to or not tensor.is_contiguous():
            return None
        to[number] = Place(count + len(results), size)
        shown.append((size, tensor.shape, tensor.dtype))
        size += watch.made[number - count].bytes
        size += -size % APART
    rest = {number: made for number, made in enumerate(watch.made, count) if number not in to}
    places, scratch = packed(rest)
    to |= {number: Place(count + len(results) + 1, begin) for number, begin in places.items()}
    template = Template([_moved(step, to) for step in recorder.steps])
    device = next(tensor.device for tensor in (*given, *results) if tensor is not None)
    return Plan(template, tuple(vacant), tuple(shown), size, scratch, device, Device.now(), recorder.tables)


def packed(arrays: dict[int, Made]) -> tuple[dict[int, int], int]:
    """Where each array begins, so that those that live at one time lie apart, and what all take: the largest first,
    each as low as it goes."""
    placed: list[tuple[int, int, Made]] = []
    begins, size = {}, 0
    for number, made in sorted(arrays.items(), key=lambda item: -item[1].bytes):
        begin = 0
        for low, high, other in sorted(placed, key=lambda item: item[0]):
            beside = other.begin < made.end and made.begin < other.end
            if beside and low < begin + made.bytes and begin < high:
                begin = high + -high % APART
        begins[number] = begin
        placed.append((begin, begin + made.bytes, made))
        size = max(size, begin + made.bytes)
    return begins, size


def _moved(step: Step, to: dict[int, Place]) -> Step:
    """The step, with the places of arrays in the memory that a plan has for them."""

    def move(value: Any) -> Any:
        if isinstance(value, Encoded):
            return value._replace(place=move(value.place))
        if not isinstance(value, Place):
            return value
        found = to[value.tensor]
        return Place(found.tensor, found.offset + value.offset)

    return step if step.start is None else step._replace(values=[move(value) for value in step.values])
