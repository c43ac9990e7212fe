"""The flow of every kind of rows and decay on a CPU: forward, backward and one token.

    S <- e^{g_t} S, then for the rows of token t:  S <- S + b (aᵀ S + uᵀ)        o_t = scale S_tᵀ q_t

with a and u = sign · coefficient · vector as ``Inputs`` has them, rows at once or one after another, reading the state
after its decay or before. One thread walks a value head of a sequence in chunks of at most 32 rows, 16 where rows read,
all of a chunk's matrices in its cache. The backward pass starts again from the states that entered each window of 8
chunks. The equations stand in ``source/forward.h`` and ``source/backward.h``. Source: Muca Cirone and Salvi 2025 (arXiv
2504.00492), section 3.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from functools import cache, reduce
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.checks import Memory
from parallelflow.kernels.cpu.build import library
from parallelflow.kernels.watch import Again, Launched, tell
from parallelflow.problem import Inputs, Sizes, Traits, sizes_of

LARGEST_HEAD, MOST_ROWS = 512, 16
WIDE = torch.float32
TYPES = {WIDE: 0, torch.bfloat16: 1, torch.float16: 2}
SLOTS = len(Inputs._fields) - 1  # all but the initial state
Field = tuple[int, ...]
ABSENT: Field = (0,) * 9
NO_LOG_DECAY = 2  # what source/flow.cpp returns where a log-decay is positive or NaN
ADDRESSES = struct.Struct(f"@{SLOTS + 3}q")  # of the inputs, output and final state
PROBLEM = struct.Struct(f"@{9 * (2 * SLOTS + 1) + 25}qd")  # struct Problem of source/problem.h, field by field


class _Layout(NamedTuple):
    """What follows from shapes, strides and dtypes alone: the axis of each slot's heads, ``struct Array`` of each slot
    without its address, and which slots are to be made dense first."""

    sizes: Sizes
    head_axes: tuple[int, ...]
    arrays: tuple[int, ...]
    strewn: tuple[int, ...]


_KNOWN: Memory[_Layout] = Memory()
_address = Tensor.data_ptr


def _layout(inputs: Inputs) -> _Layout:
    key = tuple([None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs])
    found = _KNOWN.recall(key)
    if found is not None:
        return found
    single = inputs.single()
    axes = tuple(3 if 0 < slot < 9 and slot not in single else 2 for slot in range(SLOTS))
    arrays: list[int] = []
    strewn = []
    for slot, axis in enumerate(axes):
        tensor = inputs[slot]
        if tensor is None:
            arrays += ABSENT
            continue
        if tensor.ndim > axis + 1 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            strewn.append(slot)
            tensor = tensor.contiguous()
        arrays += _array(tensor, axis)
    found = _Layout(sizes_of(inputs), axes, tuple(arrays), tuple(strewn))
    _KNOWN.keep(key, found)
    return found


def _array(tensor: Tensor, axis: int, part: int = 0) -> Field:
    """``struct Array`` of source/numbers.h without its address: ``[B, T, (R,) heads(, D)]`` with the heads on an axis,
    channels dense. ``part``: numbers in a part, whose axis comes before all others."""
    shape, stride = (tensor.shape[1:], tensor.stride()[1:]) if part else (tensor.shape, tensor.stride())
    width = shape[axis + 1] if len(shape) > axis + 1 else 1
    rows = stride[2] if axis == 3 else 0
    return 0, stride[0], stride[1], rows, stride[axis], part, TYPES[tensor.dtype], shape[axis], width


class _Call:
    """A problem as the library takes it, and what it points to."""

    def __init__(self, inputs: Inputs, traits: Traits, sequence_starts: list[int] | None) -> None:
        self.inputs, self.traits, self.starts = inputs, traits, sequence_starts
        self.sizes, self.head_axes, arrays, strewn = _layout(inputs)
        self.batch, self.time = inputs.query.shape[:2]
        self.sequences = self.batch if sequence_starts is None else len(sequence_starts) - 1
        self.threads = torch.get_num_threads()
        initial = inputs.initial_state
        self.initial = None if initial is None else initial.to(WIDE).contiguous()
        self.kept: list[Tensor] = []
        self.lists: list[object] = []
        self.given = list(arrays)
        self.tensors: list[Tensor | None] = list(inputs[:SLOTS])
        for slot in strewn:
            self.tensors[slot] = inputs[slot].contiguous()  # type: ignore[union-attr]
        for slot, tensor in enumerate(self.tensors):
            if tensor is not None:
                self.given[9 * slot] = tensor.data_ptr()

    def array(self, tensor: Tensor, axis: int, part: int = 0) -> Field:
        """``struct Array`` of an output, or of its gradient."""
        if tensor.ndim > axis + 1 and tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr(), *_array(tensor, axis, part)[1:]

    def numbers(self, tensor: Tensor | None) -> int:
        """float32, contiguous."""
        if tensor is None:
            return 0
        if tensor.dtype != WIDE or not tensor.is_contiguous():
            tensor = tensor.float().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def integers(self, numbers: list[int] | None) -> int:
        """64 bits each."""
        if numbers is None:
            return 0
        found = array("q", numbers)
        self.lists.append(found)
        return found.buffer_info()[0]

    @property
    def windows(self) -> list[int]:
        """Each sequence's first window, and their number."""
        size = _window(len(self.traits.positions), len(self.traits.lone_positions))
        lengths = [self.time] * self.sequences
        if self.starts is not None:
            lengths = [last - first for first, last in pairwise(self.starts)]
        return [0, *accumulate(-(-length // size) for length in lengths)]

    def states(self, count: int) -> Tensor:
        """``[count, HV, K, V]`` in float32."""
        _, value_heads, key_dim, value_dim, _ = self.sizes
        return self.inputs.query.new_empty(count, value_heads, key_dim, value_dim, dtype=WIDE)

    def results(self, unrounded: bool = False) -> tuple[Tensor, Tensor]:
        """Memory for the output (in float32 if ``unrounded``) and the final states."""
        _, value_heads, _, value_dim, _ = self.sizes
        query = self.inputs.query
        dtype = WIDE if unrounded else query.dtype
        output = query.new_empty(self.batch, self.time, value_heads, value_dim, dtype=dtype)
        return output, self.states(self.sequences)

    def problem(
        self,
        output: Tensor,
        final: Tensor | None,
        entries: Tensor | None = None,
        gradients: list[int] | None = None,
        d_initial: Tensor | None = None,
        parts: int = 1,
    ) -> bytes:
        """``struct Problem`` of source/problem.h."""
        inputs, traits, (heads, value_heads, key_dim, value_dim, _) = self.inputs, self.traits, self.sizes
        before = None
        if traits.sequential and traits.lone_positions:
            before = [sum(lone < place for lone in traits.lone_positions) for place in traits.positions]
        return PROBLEM.pack(
            *self.given, *self.array(output, 2), *(gradients or ABSENT * SLOTS),
            self.numbers(self.initial), self.numbers(final), self.numbers(d_initial), self.numbers(entries),
            self.integers(self.starts), self.integers(None if entries is None else self.windows), self.integers(before),
            self.batch, self.time, self.sequences, heads, value_heads, key_dim, value_dim,
            len(traits.positions), len(traits.lone_positions), traits.read_sign, traits.value_sign, traits.lone_sign,
            traits.raw, traits.sequential, inputs.write is inputs.read, self.shared, parts, self.threads,
            key_dim**-0.5 if traits.scale is None else traits.scale,
        )  # fmt: skip

    def run(self, name: str, problem: bytes) -> None:
        """Raises MemoryError where a thread's workspace cannot be had."""
        _succeed(getattr(library(), name)(problem))

    @property
    def shared(self) -> bool:
        """Whether the values' coefficients are the reads'."""
        return self.inputs.value_coefficient is self.inputs.read_coefficient is not None


def forward(
    inputs: Inputs, traits: Traits, sequence_starts: list[int] | None, keep: bool, unrounded: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output [B, T, HV, V] (in float32 if ``unrounded``), final states [N, HV, K, V] in float32 and, if ``keep``, the
    states that enter the windows.

    Inputs in float32, bfloat16 or float16, K and V at most 512, at most 16 rows a token; sequence_starts: the packed
    sequences' first tokens, and T. Products and sums are in float32.
    """
    call = _Call(inputs, traits, sequence_starts)
    if not keep and not unrounded:
        return *_only_forward(call, "parallelflow_forward"), []
    output, final = call.results(unrounded)
    entries = call.states(call.windows[-1]) if keep else None
    call.run("parallelflow_forward", call.problem(output, final, entries))
    return output, final, [] if entries is None else [entries]


def step(inputs: Inputs, traits: Traits) -> tuple[Tensor, Tensor]:
    """Output [B, 1, HV, V] and state [B, HV, K, V] after one token (T = 1)."""
    return _only_forward(_Call(inputs, traits, None), "parallelflow_step")


def _only_forward(call: _Call, name: str) -> tuple[Tensor, Tensor]:
    """Output and final states, nothing kept for a backward pass; known to who watches."""
    output, final = call.results()
    problem = call.problem(output, final)
    call.run(name, problem)
    if call.starts is None:
        tensors = (*call.tensors, call.initial, output, final)
        tell(lambda: Launched(tensors, SLOTS + 1, SLOTS + 2, True, _settle(name, problem, call.lists)))
    return output, final


def _settle(name: str, problem: bytes, lists: list[object]) -> Callable[[tuple[int, ...], bool], Again]:
    """The same pass again (see ``Launched``); ``lists`` are what the problem points to beside its tensors."""

    def settle(places: tuple[int, ...], checking: bool) -> Again:
        given = max(places) + 1
        order = itemgetter(*[given if place < 0 else place for place in places])
        start, threads = getattr(library(), f"{name}_again"), torch.get_num_threads

        def again(tensors: tuple[Tensor, ...]) -> bool:
            addresses = ADDRESSES.pack(*order((*map(_address, tensors), 0)))
            failed = start(problem, addresses, threads(), checking)
            if failed == NO_LOG_DECAY:
                return False
            _succeed(failed)
            return True

        again.lists = lists  # type: ignore[attr-defined]
        return again

    return settle


def _succeed(failed: int) -> None:
    if failed:
        raise MemoryError("parallelflow: no memory for the workspace of the CPU kernels")


def backward(
    inputs: Inputs,
    traits: Traits,
    sequence_starts: list[int] | None,
    saved: list[Tensor],
    d_output: Tensor,
    d_final: Tensor | None,
) -> Inputs:
    """Gradients of all inputs, in their shapes and dtypes; of a tensor in two slots, all of it in the first of write
    and read_coefficient. ``saved`` is the forward's; empty, the forward is run again."""
    if not saved:
        saved = forward(inputs, traits, sequence_starts, True)[2]
    call = _Call(inputs, traits, sequence_starts)
    heads, value_heads = call.sizes[:2]
    # A thread takes all value heads of a key head, and sums them, where there are threads enough for that.
    parts = 1 if call.sequences * heads >= 2 * call.threads else value_heads // heads
    found: list[Tensor | None] = []
    fields: list[int] = []
    for slot, (tensor, axis) in enumerate(zip(inputs[:SLOTS], call.head_axes, strict=True)):
        tied = (slot == 1 and tensor is inputs.write) or (slot == 5 and call.shared)
        if tensor is None or tied:
            found.append(None)
            fields += ABSENT
        else:
            own = tensor.shape[axis] == value_heads
            gradient = tensor.new_empty(tensor.shape) if own else tensor.new_empty(parts, *tensor.shape, dtype=WIDE)
            found.append(gradient)
            fields += call.array(gradient, axis, 0 if own else tensor.numel())
    d_initial = None if inputs.initial_state is None else call.states(call.sequences)
    call.run("parallelflow_backward", call.problem(d_output, d_final, saved[0], fields, d_initial, parts))
    for slot, (tensor, sums) in enumerate(zip(inputs, found, strict=False)):
        if tensor is not None and sums is not None and sums.ndim > tensor.ndim:
            found[slot] = reduce(torch.add, sums).to(tensor.dtype)
    return Inputs(*found, d_initial)  # type: ignore[arg-type,call-arg]


@cache
def _window(reads: int, lone: int) -> int:
    """Tokens between the states that the forward pass keeps."""
    return library().parallelflow_window(reads, lone)
