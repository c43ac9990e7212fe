"""A second stream, for a kernel that leaves most of the card to another one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from .recording import note

HALF_OF_A_CARD = 66  # multiprocessors of an H100 or H200: two scans of so many programs run beside each other


def leaves_room(device: torch.device, programs: int) -> bool:
    """Whether a scan of so many programs leaves room for another one."""
    return device.type == "cuda" and programs <= HALF_OF_A_CARD


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Meetings(threading.local):
    """A thread's own events, recorded again and again: making a new one for each wait takes four times as long."""

    def __init__(self) -> None:
        self.events: dict[torch.device, torch.cuda.Event] = {}
        self.streams: dict[tuple, torch.cuda.Stream] = {}

    def current(self, device: torch.device) -> torch.cuda.Stream:
        """The current stream: PyTorch makes an object of it each time."""
        mark = torch._C._cuda_getCurrentStream(device.index)
        found = self.streams.get(mark)
        if found is None:
            found = self.streams[mark] = torch.cuda.current_stream(device)
        return found

    def after(self, first: torch.cuda.Stream, then: torch.cuda.Stream, device: torch.device) -> int:
        """What ``then`` is given from here on runs after what ``first`` was given before."""
        event = self.events.get(device)
        if event is None:
            event = self.events[device] = torch.cuda.Event()
        event.record(first)
        event.wait(then)  # for what was recorded last, so that the event is free again
        return then.cuda_stream


_meetings = _Meetings()


def _fork(device: torch.device) -> int:
    return _meetings.after(_meetings.current(device), _second(device), device)


def _back(device: torch.device) -> int:
    return _meetings.current(device).cuda_stream


def _join(device: torch.device) -> int:
    return _meetings.after(_second(device), _meetings.current(device), device)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """What is launched inside runs after all that was launched before and beside what is launched next, until
    ``rejoin``. Memory is to be taken from the allocator outside, and kept until after ``rejoin``."""
    _fork(device)
    note(_fork, device)
    with torch.cuda.stream(_second(device)):
        yield
    note(_back, device)


def rejoin(device: torch.device) -> None:
    """What is launched from here on runs after all that was launched ``aside``."""
    _join(device)
    note(_join, device)
