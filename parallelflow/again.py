"""Calls that have been made before: straight to their launch.

What a model function does with its tensors, short of their numbers, follows from their shapes, strides, dtypes and
devices and from its options. The first call of a kind goes all the way, with every check, and is watched: where it came
to one launch, or to one differentiable operation, whose tensors are the arguments themselves, later ones do that with
theirs. What is computed on the way (normalised keys, a model's own step) is no argument, and such calls go all the way
each time; so do those under function transforms, autocast and torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from parallelflow.autograd import nothing_to_record, transformed
from parallelflow.checks import Memory
from parallelflow.integrate import Result
from parallelflow.kernels import watch

try:  # what torch.compile tells by that a graph fits: one call for all tensors, where Python takes ten times as long
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # then no call is remembered
    TensorGuards = None  # type: ignore[assignment, misc]

SHAPES = 512
"""First shapes, with options, that are kept for one form of call: each may hold a schedule of launches."""
MOST = 15
"""Kinds of tensors that are kept, beside the newest, for the same options and first shape."""

P = ParamSpec("P")
R = TypeVar("R")
PLAIN = (Tensor, torch.nn.Parameter)


class Launch(NamedTuple):
    """One launch with other tensors. ``output`` and ``final`` show what is made anew, without memory of their own;
    the final state may be one of the arguments instead, by its place, or not be made."""

    again: watch.Again
    output: Tensor
    final: Tensor | int | None
    returned: bool

    def __call__(self, tensors: tuple[Tensor, ...]) -> Result | None:
        """None where the launch cannot be made."""
        again, output, final, returned = self
        output = torch.empty_like(output, memory_format=torch.contiguous_format)
        state: Tensor | None = None
        if final is None:
            given = (*tensors, output)
        elif isinstance(final, int):
            state, given = tensors[final], (*tensors, output)
        else:
            state = torch.empty_like(final, memory_format=torch.contiguous_format)
            given = (*tensors, output, state)
        return Result(output, state if returned else None) if again(given) else None


class Application(NamedTuple):
    """One differentiable operation on other tensors; ``order`` picks its own from the arguments and a None."""

    function: Any
    setting: Any
    order: Callable[[tuple], tuple]
    returned: bool

    def __call__(self, tensors: tuple[Tensor, ...]) -> Result:
        function, setting, order, returned = self
        output, final = function.apply(setting, *order((*tensors, None)))
        return Result(output, final if returned else None)


class Form:
    """Calls with the same names of options and types of arguments: which are tensors, and what is known of those with
    the same values of all others, the same first shape and the same grad mode."""

    def __init__(self, arguments: tuple) -> None:
        places = [place for place, argument in enumerate(arguments) if isinstance(argument, Tensor)]
        others = [place for place, argument in enumerate(arguments) if not isinstance(argument, Tensor)]
        self.usual = len(places) > 1 and all(type(arguments[place]) in PLAIN for place in places)
        self.tensors = itemgetter(*places) if self.usual else tuple
        self.others = itemgetter(*others, others[0]) if others else _nothing  # one twice: of two or more it is a tuple
        self.known: Memory[list[tuple[Callable[..., bool], Launch | Application | None]]] = Memory(SHAPES)


def _nothing(arguments: tuple) -> tuple:
    return ()


class Calls:
    """A function's calls. ``function(arguments)`` is the whole way; the arguments are tensors and options."""

    def __init__(self) -> None:
        self._forms: dict[tuple, Form] = {}

    def __call__(self, function: Callable[[], Result], names: tuple[str, ...], arguments: tuple) -> Result:
        """The result of ``function()``, whose arguments these are, the last ones the options of these names, by its
        launch where that is known."""
        if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            return function()
        kind = (names, *map(type, arguments))
        form = self._forms.get(kind)
        if form is None:
            form = self._forms[kind] = Form(arguments)
        if not form.usual:
            return function()
        tensors = form.tensors(arguments)
        key = (torch.is_grad_enabled(), tensors[0].shape, *form.others(arguments))
        known = form.known.recall(key)
        if known is not None:
            for fits, launch in known:
                if fits(*tensors):
                    result = None if launch is None else launch(tensors)
                    return function() if result is None else result
        return self._watched(function, names, arguments, form, key)

    @staticmethod
    def _watched(
        function: Callable[[], Result], names: tuple[str, ...], arguments: tuple, form: Form, key: tuple
    ) -> Result:
        """The whole way, remembered where it came to one launch."""
        if TensorGuards is None or transformed():
            return function()
        seen: list[watch.Launched | watch.Applied] = []
        token = watch.watched.set(seen)
        try:
            result = function()
        finally:
            watch.watched.reset(token)
        tensors = form.tensors(arguments)
        if len({tensor.data_ptr() for tensor in tensors}) < len(tensors):
            return result  # one tensor twice: which is meant?
        options = dict(zip(names, arguments[len(arguments) - len(names) :], strict=True))
        launch = _way(seen[0], tensors, options, result) if len(seen) == 1 else None
        shapes: list[Any] = [list(tensor.shape) for tensor in tensors]
        strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
        fits = TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
        form.known.keep(key, [*(form.known.recall(key) or ())[-MOST:], (fits, launch)])
        return result


def remembered(model: Callable[P, R]) -> Callable[P, R]:
    """The model function, whose calls are remembered."""
    calls = Calls()

    @functools.wraps(model)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        whole: Any = lambda: model(*arguments, **options)  # noqa: E731
        found: Any = calls(whole, tuple(options), (*arguments, *options.values()))
        return found

    return call


def _way(
    seen: watch.Launched | watch.Applied, tensors: tuple[Tensor, ...], options: dict[str, Any], result: Any
) -> Launch | Application | None:
    """How to do it again: None unless what was seen had the arguments, all of them, for its tensors and made the
    result, and nothing but the arguments has a say, neither a transform nor autocast."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) or type(result) is not Result:
        return None
    validate = options.get("validate")
    checking = validate is not False and (validate is not None or device == "cpu")
    if isinstance(seen, watch.Launched):
        return _launch(seen, tensors, options, result, checking)
    return None if checking else _application(seen, tensors, result)


def _application(applied: watch.Applied, tensors: tuple[Tensor, ...], result: Result) -> Application | None:
    """Only of the arguments themselves: a gradient goes through their views."""
    if result.output is not applied.output or not (result.final_state is None or result.final_state is applied.final):
        return None
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    found = [len(tensors) if tensor is None else places.get(id(tensor), -1) for tensor in applied.tensors]
    if -1 in found or not set(range(len(tensors))) <= set(found):
        return None
    return Application(applied.function, applied.setting, itemgetter(*found), result.final_state is not None)


def _launch(
    launched: watch.Launched, tensors: tuple[Tensor, ...], options: dict[str, Any], result: Result, checking: bool
) -> Launch | None:
    output, final = launched.tensors[launched.output], launched.tensors[launched.final]
    assert output is not None
    if not nothing_to_record(tensors) or (checking and not launched.checks):
        return None
    places = {tensor.data_ptr(): place for place, tensor in enumerate(tensors)}
    in_place = None if final is None else places.get(final.data_ptr())
    if not _is(result.output, output) or (in_place is not None) != bool(options.get("in_place")):
        return None
    state = result.final_state
    if state is not None and not (_is(state, final) if in_place is None else state is tensors[in_place]):
        return None
    found = [-1 if tensor is None else places.get(tensor.data_ptr(), -2) for tensor in launched.tensors]
    found[launched.output] = len(tensors)
    if final is not None and in_place is None:
        found[launched.final] = len(tensors) + 1
    if -2 in found or not set(range(len(tensors))) <= set(found):
        return None
    again = launched.settle(tuple(found), checking)
    made: Tensor | int | None = in_place
    if final is not None and in_place is None:
        made = _shown(final if state is None else state)
    return Launch(again, _shown(result.output), made, state is not None)


def _is(result: Tensor, made: Tensor | None) -> bool:
    """Whether a result is what a launch made, if in another shape."""
    if made is None:
        return False
    same = result.data_ptr() == made.data_ptr() and result.numel() == made.numel() and result.dtype == made.dtype
    return same and result.is_contiguous()


def _shown(tensor: Tensor) -> Tensor:
    """Its shape, dtype and device."""
    return tensor.new_empty(1).expand(tensor.shape)
