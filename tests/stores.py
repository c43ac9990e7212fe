"""What a store of states must become: every sequence on its own through the model's recurrence."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallelflow.testing import Sizes, error_budget, relative_error, round_inputs
from tests.cases import Model

SIZES = Sizes(batch=3, length=5, heads=1, value_heads=2, key_size=16, value_size=12)
EXACT = ("log_decay", "beta", "erase")
"""What stays in float32 beside vectors of 16 bits."""


class Case(NamedTuple):
    """Which slots the sequences use, how a line is cut, and what is accepted; ``store`` [slots, HV, K, V] float64."""

    inputs: dict[str, Tensor]
    store: Tensor
    indices: list[int] | None = None
    bounds: list[int] | None = None
    accepted: list[int] | None = None

    def options(self, device: str = "cpu", integer: torch.dtype = torch.int32) -> dict[str, Any]:
        named = {"state_indices": self.indices, "cu_seqlens": self.bounds, "accepted_tokens": self.accepted}
        return {
            name: torch.tensor(numbers, dtype=integer, device=device)
            for name, numbers in named.items()
            if numbers is not None
        }


CASES = {
    "in place": {},
    "alone": {"indices": [3]},
    "slots": {"indices": [4, 0, 2]},
    "padding": {"indices": [-1, 3, -1]},
    "padding beside slot 0": {"indices": [0, -1, 5]},
    "all padding": {"indices": [-1, -1, -1]},
    "accepted": {"indices": [2, 1, 4], "accepted": [0, 5, 2]},
    "packed": {"bounds": [0, 3, 3, 4, 9], "indices": [1, 5, -1, 0]},
    "packed and accepted": {"bounds": [0, 3, 3, 4, 9], "indices": [1, 5, -1, 0], "accepted": [1, 0, 1, 4]},
}


def case_of(model: Model, name: str, sizes: Sizes = SIZES, **options: Any) -> Case:
    """The model's inputs and a store for one of the cases."""
    chosen = CASES[name]
    if name == "alone":
        sizes = sizes._replace(batch=1)
    if "bounds" in chosen:
        sizes = sizes._replace(batch=1, length=chosen["bounds"][-1])
    slots = 6 if "indices" in chosen else sizes.batch
    return Case(model.inputs(sizes, **options), model.initial_state(sizes, sequences=slots), **chosen)


def expected(model: Model, case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Output and store, computed in ``dtype``."""
    batch, time = case.inputs["query"].shape[:2]
    store = case.store.to(dtype).clone()
    if case.bounds is None:
        places = [(n, 0, time) for n in range(batch)]
    else:
        places = [(0, start, stop) for start, stop in pairwise(case.bounds)]
    output: Tensor | None = None
    for number, (line, start, stop) in enumerate(places):
        slot = number if case.indices is None else case.indices[number]
        if slot < 0:
            continue

        def tokens(last: int, line: int = line, start: int = start) -> dict[str, Tensor]:
            return {n: x if x.dim() == 1 else x[line : line + 1, start:last] for n, x in case.inputs.items()}

        entry = case.store[slot : slot + 1]
        if stop > start:
            found = model.oracle(tokens(stop), initial_state=entry, dtype=dtype).output
            if output is None:
                output = found.new_zeros(batch, time, *found.shape[2:])
            output[line, start:stop] = found[0]
        kept = stop if case.accepted is None else start + case.accepted[number]
        if kept > start:
            store[slot] = model.oracle(tokens(kept), initial_state=entry, dtype=dtype).final_state[0]
    value = case.inputs["value"]
    if output is None:
        output = store.new_zeros(batch, time, store.shape[1], value.shape[-1])
    return output, store


def check_within_budget(model: Model, case: Case, dtype: torch.dtype, stored: torch.dtype, device: str, **options: Any):
    """The model on the store in ``dtype``, in place: output and store within what rounding costs."""
    case = case._replace(store=case.store.to(stored).double())
    wanted = error_budget(
        lambda inputs, dtype: expected(model, case._replace(inputs=inputs), dtype), case.inputs, dtype, keep=EXACT
    )
    inputs = {name: x.to(device) for name, x in round_inputs(case.inputs, dtype, keep=EXACT).items()}
    store = case.store.to(device=device, dtype=stored)
    with torch.no_grad():
        output, final = model(
            inputs, initial_state=store, in_place=True, return_final_state=True, **case.options(device), **options
        )
    assert final is store
    assert output.dtype == dtype
    allowed = list(wanted.allowed)
    if stored == torch.bfloat16:  # each number is off by at most half a unit in its last place
        allowed[1] += torch.finfo(torch.bfloat16).eps / 2
    for name, got, reference, most in zip(("output", "store"), (output, store), wanted.reference, allowed, strict=True):
        error = relative_error(got.cpu(), reference)
        assert error <= most, f"{name}: error {error:.2e}, allowed {most:.2e}"
    return output, store
