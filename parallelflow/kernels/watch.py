"""What happens in a call, seen by whoever wants to do it again with other tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

Again = Callable[[tuple[Tensor, ...]], bool]
"""A launch with other tensors of the same kinds; False, and nothing done, where it cannot be made."""


class Launched(NamedTuple):
    """One launch that was made: its tensors in its own order, and where among them those stand that it writes.

    ``settle(places, checking)`` prepares it for other tensors: ``places`` has for each of its own the place among those
    that will be given, all of which are used, or -1 for none; ``checking``: whether log-decays are looked at each time,
    which not every launch can (``checks``).
    """

    tensors: tuple[Tensor | None, ...]
    output: int
    final: int
    checks: bool
    settle: Callable[[tuple[int, ...], bool], Again]


class Applied(NamedTuple):
    """One differentiable operation that was applied: ``function.apply(setting, *tensors)`` gave output and final
    state."""

    function: type[torch.autograd.Function]
    setting: Any
    tensors: list[Tensor | None]
    output: Tensor
    final: Tensor | None


class Derived(NamedTuple):
    """A tensor made of another one on the way: ``result = function(source)``, whatever axes of size 1 it has."""

    source: Tensor
    result: Tensor
    function: Callable[[Tensor], Tensor]


Seen = Launched | Applied | Derived
watched: ContextVar[list[Seen] | None] = ContextVar("watched", default=None)
"""Where set, a list to which is added what happens."""


def tell(seen: Callable[[], Seen]) -> None:
    """Adds it, if somebody watches; nobody does while a graph is traced."""
    if torch.compiler.is_compiling():
        return
    found = watched.get()
    if found is not None:
        found.append(seen())
