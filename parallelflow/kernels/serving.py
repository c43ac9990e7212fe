"""Short sequences without gradients on the recurrence's own kernel: what it serves, and its launch.

It is bound by the states, read once and written once. Its tiles depend on K, V and the rows alone, so a sequence has
the same bits alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallelflow.kernels.backend import too_large
from parallelflow.kernels.watch import Again, Launched, tell
from parallelflow.problem import Inputs, Traits, sizes_of

LONGEST = 64
"""Tokens a sequence; beyond, chunks are faster."""

STATES = (torch.float32, torch.bfloat16)


def refusal(inputs: Inputs, traits: Traits) -> str | None:
    """Why the kernel cannot take this problem, whatever its length; None where it can."""
    why = too_large(inputs)
    if why is not None:
        return why
    if min(inputs.query.numel(), sizes_of(inputs).value_dim) == 0:
        return "no tokens or no channels"
    state = inputs.initial_state
    if state is not None and state.dtype not in STATES:
        return f"states of dtype {state.dtype}, expected float32 or bfloat16"
    return None


def fits(states: Tensor | None) -> bool:
    """Whether states lie as the kernel reads them: each slot's ``[HV, K, V]`` densely."""
    if states is None or states.is_contiguous():
        return True
    _, _, keys, values = states.shape
    return states.stride()[1:] == (keys * values, values, 1)


class Plan(NamedTuple):
    """What follows from shapes, dtypes, strides and structure: the launch, short of its tensors. ``slots`` has for each
    of the kernel's factors its slot of the inputs, or -1, and whether it is read where it lies."""

    launch: Any
    programs: int
    slots: tuple[tuple[int, bool], ...]
    scale: float
    output: tuple[int, ...]
    final: tuple[int, ...]
    time: int
    states_stride: int
    final_stride: int


OUTPUT, FINAL = 12, 11
"""The places of what is made anew among the kernel's tensors."""


def forward(
    inputs: Inputs,
    traits: Traits,
    decided: dict[Any, Any],
    *,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    accepted_tokens: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, T, HV, V]`` and final states ``[N, HV, K, V]`` in float32, or ``initial_state`` itself, updated.

    ``cu_seqlens``, ``state_indices`` and ``accepted_tokens`` are on the tensors' device and as ``integrate`` describes
    them. ``decided`` keeps what the shapes have decided.
    """
    query, states = inputs.query, inputs.initial_state
    if not fits(states):
        assert states is not None and not in_place and state_indices is None
        states = states.contiguous()
        inputs = inputs._replace(initial_state=states)
    strides = tuple([None if tensor is None else tensor.stride() for tensor in inputs])
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    key = (strides, sequences if cu_seqlens is not None else -1, in_place)
    plan = decided.get(key)
    if plan is None:
        plan = decided[key] = _plan(inputs, traits, sequences, cu_seqlens is not None, in_place)
    output = torch.empty(plan.output, dtype=query.dtype, device=query.device)
    final = states if in_place else torch.empty(plan.final, dtype=torch.float32, device=query.device)
    assert final is not None
    factors = [
        None if slot < 0 else inputs[slot] if dense else inputs[slot].contiguous()  # type: ignore[union-attr]
        for slot, dense in plan.slots
    ]
    tensors = (*factors, states, final, output, state_indices, accepted_tokens, cu_seqlens)
    plan.launch(plan.programs, *tensors, plan.time, plan.states_stride, plan.final_stride, plan.scale)
    if in_place:
        note_change(final)
    if cu_seqlens is None or plan.time <= LONGEST:  # beyond, whether it comes here at all depends on the numbers
        tell(lambda: Launched(tensors, OUTPUT, FINAL, False, _settle(plan, tensors, in_place)))
    return output, final


def _settle(plan: Plan, tensors: tuple[Tensor | None, ...], in_place: bool) -> Callable[[tuple[int, ...], bool], Again]:
    """See ``Launched``."""
    numbers = plan.time, plan.states_stride, plan.final_stride, plan.scale

    def settle(places: tuple[int, ...], checking: bool) -> Again:
        assert not checking  # nothing is looked at on the device
        start = plan.launch.settled(plan.programs, tensors, numbers, places)
        final = places[FINAL]

        def again(given: tuple[Tensor, ...]) -> bool:
            if start is None or not start(given):
                plan.launch(plan.programs, *[None if place < 0 else given[place] for place in places], *numbers)
            if in_place:
                note_change(given[final])
            return True

        return again

    return settle


def note_change(tensor: Tensor) -> None:
    """Tells autograd that a kernel has written a tensor, so that who saved it for a backward pass gets an error."""
    if not tensor.is_inference():
        torch._C._increment_version((tensor,))  # all that torch.autograd.graph.increment_version does


def _plan(inputs: Inputs, traits: Traits, sequences: int, packed: bool, in_place: bool) -> Plan:
    from parallelflow.kernels.launch import bind
    from parallelflow.kernels.recurrence import recurrence_kernel

    _, value_heads, key_dim, value_dim, _ = sizes_of(inputs)
    batch, time = inputs.query.shape[:2]
    single = set(inputs.single())
    layouts, slots = [], []
    for slot, tensor in enumerate(inputs[:10]):
        if tensor is None:
            layouts.append((0, 0, 0, 1, 0))
            slots.append((-1, True))
            continue
        stacked = 1 <= slot <= 8 and slot not in single
        dense = _is_dense(tensor, batch, time)
        layouts.append(_layout(tensor if dense else tensor.contiguous(), time, stacked, value_heads))
        slots.append((slot, dense))
    if inputs.read is inputs.write:
        slots[1] = (-1, True)
    reading, rows = len(traits.positions), [0] * traits.rank
    for number, place in enumerate(traits.positions):
        rows[place] = number
    for number, place in enumerate(traits.lone_positions):
        rows[place] = -1 - number
    if not traits.sequential:
        rows = [*range(reading), *(-1 - number for number in range(len(traits.lone_positions)))]
    two = reading > 1 and not traits.sequential  # the state that is read is held beside the one that is written
    tile_keys, tile_values, warps = tile_of(key_dim, value_dim, two)
    launch = bind(
        recurrence_kernel, HV=value_heads, K=key_dim, V=value_dim, BK=tile_keys, BV=tile_values,
        LAYOUTS=tuple(layouts), SIGNS=(traits.read_sign, traits.value_sign, traits.lone_sign), ROWS=tuple(rows),
        RANK=traits.rank, SEQUENTIAL=traits.sequential, RAW=traits.raw, SINGLE=time == 1 and not packed,
        IN_PLACE=in_place, num_warps=warps,
    )  # fmt: skip
    tiles = -(-value_dim // tile_values)
    scale = key_dim**-0.5 if traits.scale is None else traits.scale
    states = inputs.initial_state
    states_stride = 0 if states is None else states.stride(0)
    final_stride = states_stride if in_place else value_heads * key_dim * value_dim
    return Plan(
        launch, sequences * value_heads * tiles, tuple(slots), scale, (batch, time, value_heads, value_dim),
        (sequences, value_heads, key_dim, value_dim), time, states_stride, final_stride,
    )  # fmt: skip


def tile_of(key_dim: int, value_dim: int, two: bool) -> tuple[int, int, int]:
    """Key channels and value channels of a program, and its warps: all of K, rows of 128 bytes where registers allow.

    One number in 32 a thread and tile.
    """
    keys = max(16, 1 << (key_dim - 1).bit_length())
    values = min(32 if keys <= 128 and not two else 16, max(16, 1 << (value_dim - 1).bit_length()))
    return keys, values, max(1, keys * values // 1024)


def _is_dense(tensor: Tensor, batch: int, time: int) -> bool:
    """Whether tokens follow one another at one distance, each token's rows, heads and channels within it."""
    strides, shape = tensor.stride(), tensor.shape
    if strides[-1] != 1 and shape[-1] != 1:
        return False
    if time > 1 and batch > 1 and strides[0] != time * strides[1]:
        return False
    token = strides[1] if time > 1 else strides[0]
    extent = sum((size - 1) * stride for size, stride in zip(shape[2:], strides[2:], strict=True)) + 1
    return token == 0 or extent <= token or batch * time == 1


def _layout(tensor: Tensor, time: int, stacked: bool, value_heads: int) -> tuple[int, int, int, int, int]:
    """Strides of tokens, rows and heads, value heads a head, and whether channels follow."""
    strides = tensor.stride()
    token = strides[1] if time > 1 else strides[0]
    heads = 3 if stacked else 2
    channels = int(tensor.ndim > heads + 1)
    return token, strides[2] if stacked else 0, strides[heads], value_heads // tensor.shape[heads], channels
