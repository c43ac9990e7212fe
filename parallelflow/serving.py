"""States that live in a store: read from slots, updated in place, kept after the tokens that were accepted.

``through`` does it around any engine, in plain tensor algebra, and specifies what the kernel for short sequences does
in one launch (``advance``). Neither waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallelflow.autograd import CODE, SLOTS, TENSORS, Code, Setting, nothing_to_record
from parallelflow.checks import Memory, expect_tensor, fingerprint, show, state_name
from parallelflow.problem import Inputs, Traits, sizes_of
from parallelflow.torch_backend import Plan

Engine = Callable[[Inputs], tuple[Tensor, Tensor | None]]


class Store(NamedTuple):
    """Where states come from and go to. ``indices [N]``: each sequence's slot of the initial state, -1 for a row that
    is padding; ``accepted [N]``: the tokens of each sequence after which its state is kept; ``in_place``: whether it is
    written where it was read. See ``integrate``. (No properties: PyTorch 2.9 traces a tuple's methods alone.)"""

    indices: Tensor | None = None
    accepted: Tensor | None = None
    in_place: bool = False

    def plain(self) -> bool:
        """Whether there is nothing to do."""
        return self.indices is None and self.accepted is None and not self.in_place

    def stored(self) -> bool:
        """Whether the initial state is a store, which may have 16 bits."""
        return self.in_place or self.indices is not None

    def check(self, initial_state: Tensor | None, query: Tensor, cu_seqlens: Tensor | None, values: bool) -> None:
        """TypeError or ValueError for what does not fit; ``values``: look at the numbers too."""
        sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        for name, tensor in (("state_indices", self.indices), ("accepted_tokens", self.accepted)):
            if tensor is None:
                continue
            expect_tensor(name, tensor)
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name}: got dtype {tensor.dtype}, expected int32 or int64")
            if tuple(tensor.shape) != (sequences,):
                raise ValueError(f"{name}: got shape {show(tensor)}, expected one number a sequence, [{sequences}]")
            if tensor.device != query.device:
                raise ValueError(f"{name}: got device {tensor.device}, expected the query's, {query.device}")
        if self.stored() and initial_state is None:
            name = "in_place" if self.in_place else "state_indices"
            raise ValueError(f"initial_state: got none with {name}, expected the states [slots, HV, K, V]")
        if self.indices is not None and initial_state is not None and initial_state.shape[0] == 0:
            raise ValueError(f"{state_name()}: got no slots, expected at least one with state_indices")
        if values:
            self._check_values(initial_state, query, cu_seqlens)

    def _check_values(self, initial_state: Tensor | None, query: Tensor, cu_seqlens: Tensor | None) -> None:
        if self.indices is not None and initial_state is not None:
            slots, chosen = initial_state.shape[0], self.indices.tolist()
            if any(not -1 <= slot < slots for slot in chosen):
                raise ValueError(
                    f"state_indices: got {chosen}, expected slots from 0 to {slots - 1}, or -1 for padding"
                )
            real = [slot for slot in chosen if slot >= 0]
            if self.in_place and len(set(real)) < len(real):
                raise ValueError(f"state_indices: got {chosen}, expected each slot once, as all are updated in place")
        if self.accepted is not None:
            lengths = [query.shape[1]] * query.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()
            kept = self.accepted.tolist()
            if any(not 0 <= count <= length for count, length in zip(kept, lengths, strict=True)):
                raise ValueError(f"accepted_tokens: got {kept}, expected from 0 to the sequences' lengths {lengths}")


def through(engine: Engine, inputs: Inputs, store: Store, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The engine from and to a store: output, and the final states, or the store itself, updated.

    Rows of padding have zeros for outputs and states. The state after the accepted tokens is that of a second pass in
    which the others neither decay, read nor write.
    """
    held = inputs.initial_state
    if store.in_place:
        if not nothing_to_record(inputs):
            raise ValueError("in_place: got True where gradients are recorded, expected torch.no_grad() around it")
        assert held is not None
    valid = None
    if held is not None and store.stored():
        entry = held
        if store.indices is not None:
            valid = store.indices >= 0
            entry = held.index_select(0, store.indices.clamp(min=0))
        inputs = inputs._replace(initial_state=entry.to(sizes_of(inputs).compute_dtype))
    output, final = engine(inputs)
    assert final is not None
    if store.accepted is not None:
        final = engine(_only(inputs, _among(store.accepted, inputs.query, cu_seqlens)))[1]
        assert final is not None
    if valid is not None:
        tokens = _spread(valid, inputs.query, cu_seqlens)
        output = torch.where(tokens[..., None, None], output, 0)
        final = torch.where(valid[:, None, None, None], final, 0)
    if not store.in_place:
        return output, final
    assert held is not None
    final = final.to(held.dtype)
    if store.indices is None:
        held.copy_(final)
    else:
        # Padding writes to slot 0 what is to stand there in any case, so that no shape depends on the numbers.
        assert valid is not None
        first = store.indices == 0
        own = torch.where(first.any(), final.index_select(0, first.int().argmax().reshape(1)), held[:1])
        held.index_copy_(0, store.indices.clamp(min=0).long(), torch.where(valid[:, None, None, None], final, own))
    return output, held


def _spread(numbers: Tensor, query: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A number a sequence ``[N]`` as one a token ``[B, T]``."""
    batch, time = query.shape[:2]
    if cu_seqlens is None:
        return numbers[:, None].expand(batch, time)
    return numbers[_sequence_of_tokens(query, cu_seqlens)][None]


def _sequence_of_tokens(query: Tensor, cu_seqlens: Tensor) -> Tensor:
    tokens = torch.arange(query.shape[1], device=query.device)
    return torch.searchsorted(cu_seqlens.to(tokens), tokens, right=True) - 1


def _among(counts: Tensor, query: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Whether a token ``[B, T]`` is among its sequence's first ``counts``."""
    tokens = torch.arange(query.shape[1], device=query.device)[None]
    if cu_seqlens is not None:
        tokens = tokens - cu_seqlens.to(tokens)[_sequence_of_tokens(query, cu_seqlens)]
    return tokens < _spread(counts, query, cu_seqlens)


def _only(inputs: Inputs, live: Tensor) -> Inputs:
    """The inputs with rows and decays of zero for all other tokens; ties stay ties."""
    return inputs.each(
        range(1, 10), lambda tensor: torch.where(live.view(*live.shape, *[1] * (tensor.ndim - 2)), tensor, 0)
    )


# The kernel: eager, and as registered operators under torch.compile.


def advance(
    inputs: Inputs, traits: Traits, store: Store, cu_seqlens: Tensor | None, decided: dict[Any, Any]
) -> tuple[Tensor, Tensor]:
    """``through`` on the kernel for short sequences, which records no gradient."""
    if torch.compiler.is_compiling():
        setting = Setting(traits, Plan(), None, "recurrence").with_ties(inputs)
        untied = setting.untied(inputs)
        numbers = (cu_seqlens, store.indices, store.accepted)
        if not store.in_place:
            return _advance(*untied, *numbers, *Code.of(setting))
        assert inputs.initial_state is not None
        return _advance_in_place(*untied, *numbers, *Code.of(setting)), inputs.initial_state
    from parallelflow.kernels import serving

    with torch.no_grad():
        return serving.forward(
            inputs, traits, decided, cu_seqlens=cu_seqlens, state_indices=store.indices,
            accepted_tokens=store.accepted, in_place=store.in_place,
        )  # fmt: skip


def _call(arguments: tuple, in_place: bool) -> tuple[Tensor, Tensor]:
    cu_seqlens, indices, accepted = arguments[SLOTS : SLOTS + 3]
    setting = Code(*arguments[SLOTS + 3 :]).setting(None)
    inputs = setting.tied(Inputs(*arguments[:SLOTS]))
    key = (setting, *fingerprint(*inputs))
    decided = _DECIDED.recall(key)
    if decided is None:
        decided = {}
        _DECIDED.keep(key, decided)
    return advance(inputs, setting.traits, Store(indices, accepted, in_place), cu_seqlens, decided)


_DECIDED: Memory[dict[Any, Any]] = Memory()


NUMBERS = "Tensor? cu_seqlens, Tensor? state_indices, Tensor? accepted_tokens"


@torch.library.custom_op(
    "parallelflow::advance", mutates_args=(), schema=f"({TENSORS}, {NUMBERS}, {CODE}) -> (Tensor, Tensor)"
)
def _advance(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _call(arguments, False)


@torch.library.custom_op(
    "parallelflow::advance_in_place",
    mutates_args=("initial_state",),
    schema=f"({TENSORS}, {NUMBERS}, {CODE}) -> Tensor".replace("Tensor? initial_state", "Tensor(a!) initial_state"),
)
def _advance_in_place(*arguments: Any) -> Tensor:
    return _call(arguments, True)[0]


def _shapes(arguments: tuple) -> tuple[Tensor, Tensor]:
    untied, cu_seqlens = Inputs(*arguments[:SLOTS]), arguments[SLOTS]
    setting = Code(*arguments[SLOTS + 3 :]).setting(None)
    query = untied.query
    _, value_heads, key_dim, value_dim, _ = sizes_of(setting.tied(untied))
    batch, time = query.shape[:2]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = query.new_empty(sequences, value_heads, key_dim, value_dim, dtype=torch.float32)
    return query.new_empty(batch, time, value_heads, value_dim), final


@_advance.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    return _shapes(arguments)


@_advance_in_place.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    return _shapes(arguments)[0]
