"""Launches that are recorded once and made again with other tensors, without looking at anything but addresses.

While somebody records, ``launch`` tells what it hands to the kernels' entry points. Of an address it is found out in
which of the tensors at hand it lies, and how far from their beginnings: a ``Template``, of which the launches for other
tensors follow by additions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.driver import driver

ALIGNMENT = 16  # bytes: what Triton assumes of an address, or compiles another kernel


class Step(NamedTuple):
    """A launch: entry point, programs, and what it takes after the stream. Or something in between: None, a function
    that returns the stream of the launches that follow, and the device it is called with."""

    start: Callable[..., None] | None
    programs: Any
    values: Any


class Device(NamedTuple):
    """The device that launches were made on, and who tells which is the current one, and its current stream."""

    number: int
    current: Callable[[], int]
    stream: Callable[[int], int]

    @staticmethod
    def now() -> Device:
        """The current one."""
        active = driver.active
        current = active.get_current_device
        if current is torch.cuda.current_device:  # it asks each time whether CUDA has begun
            current = torch._C._cuda_getDevice
        return Device(active.get_current_device(), current, active.get_current_stream)

    def take(self, steps: Sequence[Step]) -> bool:
        """Launches on the current stream; False, and nothing done, if another device is the current one."""
        number, current, current_stream = self
        if current() != number:
            return False
        stream = current_stream(number)
        for start, programs, values in steps:
            if start is None:
                stream = programs(values)
            else:
                start(programs, 1, 1, stream, *values)
        return True


class Place(NamedTuple):
    """An address: of the tensors at hand, the number of the one it lies in, and the bytes from its beginning."""

    tensor: int
    offset: int


class Encoded(NamedTuple):
    """A descriptor of what begins at a place, and how it is encoded."""

    place: Place
    descriptor: Any
    encoding: Any


class Recorder:
    """What is launched, with places for addresses. Tensors other than those at hand are tables, which stay where they
    are: ``tables`` has them, for whoever makes the launches again to hold. ``before`` is called before each launch.
    """

    before: Callable[[], None] | None = None

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.steps: list[Step] = []
        self.tables: list[Tensor] = []
        self.complete = True
        self.regions: dict[int, tuple[int, int]] = {}
        for number, tensor in enumerate(tensors):
            if tensor is not None:
                self.enter(number, tensor)
        edges = sorted(self.regions.values())
        self.apart = all(end <= begin for (_, end), (begin, _) in pairwise(edges))

    def enter(self, number: int, tensor: Tensor) -> None:
        """A tensor is at hand, a contiguous one."""
        begin, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if size:
            self.regions[number] = begin, begin + size

    def place(self, address: int) -> Place | None:
        """Where an address lies; None where it lies nowhere."""
        for number, (begin, end) in self.regions.items():
            if begin <= address < end:
                return Place(number, address - begin)
        return None

    def launched(
        self, start: Any, programs: int, values: tuple, tensors: Sequence[tuple[int, Tensor]], encoded: list[tuple]
    ) -> None:
        """One launch. Of the values that the entry point takes after the stream, ``tensors`` has the positions of
        addresses, and the tensors; ``encoded`` the positions of descriptors, these and their encodings."""
        if self.before is not None:
            self.before()
        marked = list(values)
        for position, tensor in tensors:
            place = self.place(values[position])
            if place is not None:
                marked[position] = place
            elif tensor.numel():
                self.tables.append(tensor)
        for position, descriptor, encoding in encoded:
            place = self.place(descriptor.origin)
            if place is None:  # a descriptor does not hold what it describes
                self.complete = False
            else:
                marked[position] = Encoded(place, descriptor, encoding)
        self.steps.append(Step(start, programs, marked))


class _Recording(threading.local):
    """Who records what this thread launches."""

    recorder: Recorder | None = None

    def incomplete(self) -> None:
        """Something was launched that cannot be recorded."""
        if self.recorder is not None:
            self.recorder.complete = False


recording = _Recording()


def record(recorder: Recorder, launches: Callable[[], Any]) -> Any:
    """What ``launches()`` returns; ``recorder`` is told what it launches."""
    recording.recorder = recorder
    try:
        return launches()
    finally:
        recording.recorder = None


def note(action: Callable[[Any], int], device: Any) -> None:
    """Something between launches that is to be done again with them: ``action(device)`` returns the stream of those
    that follow."""
    if recording.recorder is not None:
        recording.recorder.steps.append(Step(None, action, device))


class Template:
    """Recorded launches, for tensors that lie elsewhere: at addresses that are multiples of 16, one for each number in
    the record."""

    LARGEST = 4096  # encodings that are kept

    def __init__(self, steps: Sequence[Step]) -> None:
        places: dict[Place, int] = {}
        descriptors: dict[tuple, int] = {}
        self.descriptors: list[Encoded] = []
        plain: list[Any] = []
        marks: list[list[tuple[int, int]]] = []
        for step in steps:
            own: list[tuple[int, int]] = []  # which of three lists a value comes from, and its place there
            for value in step.values if step.start is not None else ():
                if isinstance(value, Place):
                    own.append((0, places.setdefault(value, len(places))))
                elif isinstance(value, Encoded):
                    key = (value.place, id(value.descriptor), id(value.encoding))
                    if key not in descriptors:
                        self.descriptors.append(value)
                    own.append((1, descriptors.setdefault(key, len(descriptors))))
                else:
                    own.append((2, len(plain)))
                    plain.append(value)
            marks.append(own)
        self.places, self.plain = list(places), tuple(plain)
        begins = (0, len(places), len(places) + len(descriptors))
        self.steps = [
            (step, itemgetter(*[begins[part] + at for part, at in own]) if own else None)
            for step, own in zip(steps, marks, strict=True)
        ]
        self.encodings: dict[tuple[int, int], Any] = {}

    def at(self, addresses: Sequence[int]) -> list[Step]:
        """The launches for tensors at these addresses."""
        pool = (
            *[addresses[tensor] + offset for tensor, offset in self.places],
            *[self._encode(number, addresses) for number in range(len(self.descriptors))],
            *self.plain,
        )
        return [step if order is None else Step(step.start, step.programs, order(pool)) for step, order in self.steps]

    def _encode(self, number: int, addresses: Sequence[int]) -> Any:
        (tensor, offset), descriptor, encoding = self.descriptors[number]
        address = addresses[tensor] + offset
        found = self.encodings.get((number, address))
        if found is None:
            if len(self.encodings) >= self.LARGEST:
                self.encodings.clear()
            found = encoding.encode(descriptor.moved(address), encoding.metadata)[0]
            self.encodings[number, address] = found
        return found
