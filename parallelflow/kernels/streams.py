"""A second stream, for a kernel that leaves most of the card to another one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """What is launched inside runs after all that was launched before and beside what is launched next, until
    ``rejoin``. Memory is to be taken from the allocator outside, and kept until after ``rejoin``."""
    second = _second(device)
    second.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(second):
        yield


def rejoin(device: torch.device) -> None:
    """What is launched from here on runs after all that was launched ``aside``."""
    torch.cuda.current_stream(device).wait_stream(_second(device))
