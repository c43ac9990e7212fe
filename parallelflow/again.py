"""Calls that have been made before: straight to their launch.

What a model function does with its tensors, short of their numbers, follows from their shapes, strides, dtypes and
devices and from its options. The first call of a kind goes all the way, with every check, and is watched: where it came
to one launch of the kernel for short sequences, whose tensors are the arguments themselves, later ones make that
launch with theirs. What is computed on the way (normalised keys, a model's own step) is no argument, and such calls go
all the way each time; so do those under autograd, function transforms, autocast and torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from parallelflow.autograd import nothing_to_record
from parallelflow.checks import Memory
from parallelflow.integrate import Result
from parallelflow.kernels import serving

P = ParamSpec("P")
R = TypeVar("R")
PLAIN = (Tensor, torch.nn.Parameter)


class Launch(NamedTuple):
    """One launch with other tensors: for each of the kernel's, its place among the arguments, or -1 for none."""

    plan: serving.Plan
    places: tuple[int, ...]
    output: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    in_place: bool
    final: bool

    def __call__(self, arguments: tuple) -> Result:
        plan = self.plan
        output = torch.empty(self.output, dtype=self.dtype, device=self.device)
        tensors = [None if place < 0 else arguments[place] for place in self.places]
        tensors[serving.OUTPUT] = output
        if self.in_place:
            final = tensors[serving.FINAL]
        else:
            final = tensors[serving.FINAL] = torch.empty(plan.final, dtype=torch.float32, device=self.device)
        plan.launch(plan.programs, *tensors, plan.time, plan.states_stride, plan.final_stride, plan.scale)
        if self.in_place:
            assert final is not None
            serving.note_change(final)
        return Result(output, final if self.final else None)


class Calls:
    """A function's calls. ``function(arguments)`` is the whole way; the arguments are tensors and options."""

    def __init__(self) -> None:
        self._launches: Memory[Launch | None] = Memory()

    def __call__(self, function: Callable[[], Result], names: tuple[str, ...], arguments: tuple) -> Result:
        """The result of ``function()``, whose arguments these are, by its launch where that is known."""
        if torch.compiler.is_compiling():
            return function()
        key = (names, *map(_kind, arguments))
        launch = self._launches.recall(key)
        if launch is not None:
            if _usual(launch.device, arguments):
                return launch(arguments)
            return function()
        launches: list[serving.Launched] = []
        token = serving.watched.set(launches)
        try:
            result = function()
        finally:
            serving.watched.reset(token)
        found = _launch(launches, arguments, result)
        if found is not None and _usual(found.device, arguments):
            options = dict(zip(names, arguments[len(arguments) - len(names) :], strict=True))
            if not _looks_at_numbers(options, found):
                self._launches.keep(key, found)
        return result


def remembered(model: Callable[P, R]) -> Callable[P, R]:
    """The model function, whose calls on a store are remembered."""
    calls = Calls()

    @functools.wraps(model)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        if not options.get("in_place") and options.get("state_indices") is None:
            return model(*arguments, **options)
        whole: Any = lambda: model(*arguments, **options)  # noqa: E731
        found: Any = calls(whole, tuple(options), (*arguments, *options.values()))
        return found

    return call


def _looks_at_numbers(options: dict[str, Any], launch: Launch) -> bool:
    """Whether a call reads its tensors' numbers on the host: to check them, or to choose its way by boundaries."""
    validate = options.get("validate")
    checked = validate is not False and (validate is not None or launch.device.type == "cpu")
    packed = options.get("cu_seqlens") is not None
    bounds = packed and (launch.plan.time > serving.LONGEST or options.get("cu_seqlens_cpu") is not None)
    return checked or bounds


def _kind(argument: Any) -> object:
    """All of an argument that decides what is done with it, if it is a tensor; else its value and type."""
    if isinstance(argument, Tensor):
        return type(argument), argument.shape, argument.stride(), argument.dtype, argument.device
    return type(argument), argument


def _usual(device: torch.device, arguments: tuple) -> bool:
    """Whether nothing but the arguments has a say: neither autograd nor a transform nor autocast."""
    return not torch.is_autocast_enabled(device.type) and nothing_to_record(
        [argument for argument in arguments if isinstance(argument, Tensor)]
    )


def _launch(launches: list[serving.Launched], arguments: tuple, result: Result) -> Launch | None:
    """How to do it again: None unless one launch had the arguments for its tensors and made the result."""
    if len(launches) != 1:
        return None
    plan, used = launches[0]
    places: dict[int, int] = {}
    for place, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            continue
        if type(argument) not in PLAIN or places.setdefault(argument.data_ptr(), place) != place:
            return None
    output, final = used[serving.OUTPUT], used[serving.FINAL]
    assert output is not None
    assert final is not None
    if result.output.data_ptr() != output.data_ptr() or result.output.dtype != output.dtype:
        return None
    if result.final_state is not None and result.final_state.data_ptr() != final.data_ptr():
        return None
    in_place = final.data_ptr() in places
    made = {serving.OUTPUT} if in_place else {serving.OUTPUT, serving.FINAL}
    if not all(dense for _, dense in plan.slots):
        return None
    where = tuple(
        -1 if tensor is None or number in made else places.get(tensor.data_ptr(), -2)
        for number, tensor in enumerate(used)
    )
    if -2 in where:
        return None
    returned = result.final_state is not None
    return Launch(plan, where, tuple(result.output.shape), output.dtype, output.device, in_place, returned)
