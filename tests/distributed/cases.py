"""One call on ranks beside the same call on one device: outputs, final states and all gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from parallelflow import functional
from tests.cases import assert_close

Call = tuple[str, dict[str, Any]]
"""A function of ``parallelflow.functional`` and its options."""


def edges_of(lengths: list[int]) -> list[int]:
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return edges


def weights(like: Tensor, seed: int) -> Tensor:
    """What makes a loss of a tensor; the same numbers in every dtype."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(like)


def timed(tensor: Tensor) -> bool:
    """Whether a model's input has an axis of time."""
    return tensor.ndim > 1


def alone(call: Call, inputs: dict[str, Tensor], state: Tensor | None, starts: list[int] | None) -> dict[str, Any]:
    """On one device."""
    name, options = call
    inputs = {key: tensor.detach().requires_grad_() for key, tensor in inputs.items()}
    state = None if state is None else state.detach().requires_grad_()
    cu_seqlens = None if starts is None else torch.tensor(starts)
    output, final = getattr(functional, name)(
        **inputs, **options, initial_state=state, return_final_state=True, cu_seqlens=cu_seqlens
    )[:2]
    ((output * weights(output, 1)).sum() + (final * weights(final, 2)).sum()).backward()
    return {
        "output": output.detach(),
        "final": final.detach(),
        **{f"d {key}": tensor.grad for key, tensor in inputs.items()},
        "d state": None if state is None else state.grad,
    }


def on_rank(
    group: Any,
    call: Call,
    inputs: dict[str, Tensor],
    state: Tensor | None,
    starts: list[int] | None,
    lengths: list[int],
    options: dict[str, Any],
) -> dict[str, Any]:
    """This rank's share of ``alone``. The weights of the loss are those of the whole line."""
    name, chosen = call
    rank, last = group.rank(), group.size() - 1
    first, stop = edges_of(lengths)[rank : rank + 2]
    mine = {key: (x[:, first:stop] if timed(x) else x).clone().requires_grad_() for key, x in inputs.items()}
    if state is not None:
        state = state.clone().requires_grad_()
    given = state if rank == 0 or starts is not None else None
    cu_seqlens = None if starts is None else torch.tensor(starts)
    output, final = getattr(functional, name)(
        **mine, **chosen, initial_state=given, return_final_state=True, cu_seqlens=cu_seqlens,
        aggregate="distributed", context_group=group, **options,
    )[:2]  # fmt: skip
    whole = output.new_empty(output.shape[0], edges_of(lengths)[-1], *output.shape[2:])
    loss = (output * weights(whole, 1)[:, first:stop]).sum()
    everywhere = options.get("final_state_on") == "all"
    assert (final is not None) == (everywhere or rank == last)
    if final is not None:
        share = group.size() if everywhere else 1
        loss = loss + (final * weights(final, 2)).sum() / share
    loss.backward()
    return {
        "output": output.detach(),
        "final": None if final is None else final.detach(),
        **{f"d {key}": tensor.grad for key, tensor in mine.items()},
        "d state": None if state is None else state.grad,
    }


def expect_same(expected: dict[str, Any], found: list[dict[str, Any]], tolerance: float = 1e-10) -> None:
    """What the ranks have is what one device has: tokens side by side, anything else summed."""
    for name, whole in expected.items():
        parts = [each[name] for each in found]
        if whole is None:
            assert all(part is None for part in parts)
        elif name == "final":
            for part in parts:
                if part is not None:
                    assert_close(part, whole, tolerance, name)
        elif name == "d state" or whole.ndim == 1:
            assert_close(sum(part for part in parts if part is not None), whole, tolerance, name)
        else:
            assert_close(torch.cat(parts, 1), whole, tolerance, name)


def consistent(lengths: list[int], starts: list[int]) -> bool:
    return starts[-1] == sum(lengths) and all(a <= b for a, b in pairwise(starts))
