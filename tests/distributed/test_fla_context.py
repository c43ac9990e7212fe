"""FLA's ``cp_context`` over ranks, beside one device: outputs and gradients of every function that takes one."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallelflow.compat import fla
from parallelflow.compat.fla.context import boundaries
from tests.compat.test_fla import call, draw

LENGTH = 12  # tokens, of which each rank has as many
STARTS = [0, 1, 5, 6, 11, 12]
"""Sequences that begin at a rank's first token, lie on several ranks, or are one token."""

NAMES = [
    name
    for names in fla.FAMILIES.values()
    for name in names
    if "cp_context" in inspect.signature(getattr(fla, name)).parameters and name != "chunk_gdn"
]


def piece(rank, size, starts):
    """What FLA's context says on a rank: its own boundaries, from its first token."""
    tokens = LENGTH // size
    first, last = rank * tokens, (rank + 1) * tokens
    inner = [bound - first for bound in starts if first < bound < last]
    return first in starts, [0, *inner, tokens]


def on_rank(group, name, starts):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    begins, own = piece(rank, size, starts)
    context = SimpleNamespace(group=group, cu_seqlens=torch.tensor(own, dtype=torch.int32), is_first_rank=begins)
    tensors = {
        letter: x.detach().chunk(size, 1)[rank].requires_grad_() for letter, x in draw(name, LENGTH, batch=1).items()
    }
    output, state = call(name, tensors, cp_context=context, chunk_size=2) if takes_size(name) else call(
        name, tensors, cp_context=context
    )  # fmt: skip
    assert state is None
    weights = torch.linspace(1, 2, LENGTH, dtype=torch.float64).chunk(size)[rank][None, :, None, None]
    gradients = torch.autograd.grad((output.sin() * weights).sum(), list(tensors.values()))
    return output.detach(), dict(zip(tensors, gradients, strict=True))


def takes_size(name):
    return "chunk_size" in inspect.signature(getattr(fla, name)).parameters


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_over_ranks(ranks, name, size):
    found = ranks.run(size, on_rank, name, STARTS)
    tensors = draw(name, LENGTH, batch=1)
    output, _ = call(name, tensors, cu_seqlens=torch.tensor(STARTS))
    weights = torch.linspace(1, 2, LENGTH, dtype=torch.float64)[None, :, None, None]
    gradients = torch.autograd.grad((output.sin() * weights).sum(), list(tensors.values()))
    torch.testing.assert_close(torch.cat([each for each, _ in found], 1), output.detach(), rtol=1e-10, atol=1e-12)
    for letter, gradient in zip(tensors, gradients, strict=True):
        ours = torch.cat([each[letter] for _, each in found], 1)
        torch.testing.assert_close(
            ours, gradient, rtol=1e-10, atol=1e-12, msg=lambda said, letter=letter: f"d {letter}: {said}"
        )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("starts", [STARTS, [0, 12], [0, 3, 6, 9, 12], list(range(13)), [0, 11, 12]])
def test_the_whole_lines_boundaries(size, starts):
    assert boundaries([piece(rank, size, starts) for rank in range(size)]) == starts
