"""A second stream, for a kernel that leaves most of the card to another one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from .launch import note

HALF_OF_A_CARD = 66  # multiprocessors of an H100 or H200: two scans of so many programs run beside each other


def leaves_room(device: torch.device, programs: int) -> bool:
    """Whether a scan of so many programs leaves room for another one."""
    return device.type == "cuda" and programs <= HALF_OF_A_CARD


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _fork(device: torch.device) -> int:
    second = _second(device)
    second.wait_stream(torch.cuda.current_stream(device))
    return second.cuda_stream


def _back(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _join(device: torch.device) -> int:
    current = torch.cuda.current_stream(device)
    current.wait_stream(_second(device))
    return current.cuda_stream


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
