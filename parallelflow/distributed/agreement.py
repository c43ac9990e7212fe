"""Before any work: every rank has the same shapes and settings, or all raise the same error."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, NoReturn

import torch
from torch._compile import _disable_dynamo

from parallelflow.distributed.context import Context

Settings = dict[str, object]
"""What must be the same on all ranks, by the argument's name."""


class Agreement(NamedTuple):
    """Tokens of each rank, and whether any of them records for a backward pass."""

    lengths: list[int]
    recording: bool


def agree(context: Context, settings: Settings, tokens: int, recording: bool, device: torch.device) -> Agreement:
    """One exchange of a digest of the settings; a second one, of the settings, only to say what differs.

    Raises:
        ValueError: on every rank, naming the argument, the rank, what it has and what the first rank has; or what
            another rank raised (``refuse``).
        ContextGroupError: where the others do not come.
    """
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).digest()
    everyone = _exchange(context, [int.from_bytes(digest[:7], "big"), tokens, int(recording), 0], device)
    if any(failed for *_, failed in everyone) or len({code for code, *_ in everyone}) > 1:
        _explain(context, settings)
    return Agreement([count for _, count, *_ in everyone], any(records for _, _, records, _ in everyone))


@_disable_dynamo
def lengths_of(context: Context, tokens: int, device: torch.device) -> list[int]:
    """The tokens of every rank, from every rank's own."""
    return [count for _, count, *_ in _exchange(context, [0, tokens, 0, 0], device)]


def refuse(context: Context, error: Exception, device: torch.device) -> NoReturn:
    """Tells the other ranks what is wrong on this one, and raises it."""
    _exchange(context, [0, 0, 0, 1], device)
    context.gather_objects(error, "the errors of all ranks")
    raise error


def _exchange(context: Context, message: list[int], device: torch.device) -> list[list[int]]:
    numbers = torch.tensor(message, dtype=torch.int64, device=context.message_device(device))
    return [each.tolist() for each in context.gather(numbers, "the agreement on shapes and settings before any work")]


def _explain(context: Context, settings: Settings) -> NoReturn:
    everyone = context.gather_objects(settings, "the settings of all ranks")
    for rank, found in enumerate(everyone):
        if isinstance(found, Exception):
            raise ValueError(f"context_group: rank {rank} raised {type(found).__name__}: {found}")
    first = everyone[0]
    for rank, found in enumerate(everyone):
        for name in sorted({*first, *found}):
            if first.get(name) != found.get(name):
                raise ValueError(
                    f"{name}: got {found.get(name)} on rank {rank} of {context.size}, expected the first rank's "
                    f"{first.get(name)}"
                )
    raise ValueError("context_group: the ranks' settings differ, but not in what they say of them")
