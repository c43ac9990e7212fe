"""Calls that have been made before: straight to their launch.

What a model function does with its tensors, short of their numbers, follows from their shapes, strides, dtypes and
devices and from its options. The first call of a kind goes all the way, with every check, and is watched: where it came
to one launch, or to one differentiable operation, whose tensors are the arguments themselves or their normalised
vectors, later ones do that with theirs. What else is computed on the way (a model's own step) is no argument, and such
calls go all the way each time; so do those under function transforms, autocast and torch.compile.
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
    """One launch with other tensors. ``output`` and ``final`` show what is made anew, without memory of their own; the
    output may be like one of the arguments, by its place, and the final state be one of them, or not be made."""

    again: watch.Again
    output: Tensor | int
    final: Tensor | int | None
    returned: bool

    def __call__(self, tensors: tuple[Tensor, ...]) -> Result | None:
        """None where the launch cannot be made."""
        again, like, final, returned = self
        if isinstance(like, int):
            output = torch.empty_like(tensors[like])  # a fifth less on the host than the other way
        else:
            output = torch.empty_like(like, memory_format=torch.contiguous_format)
        state: Tensor | None = None
        if final is None:
            given = (*tensors, output)
        elif isinstance(final, int):
            state, given = tensors[final], (*tensors, output)
        else:
            state = torch.empty_like(final, memory_format=torch.contiguous_format)
            given = (*tensors, output, state)
        return Result(output, state if returned else None) if again(given) else None


class Prepared(NamedTuple):
    """Tensors made of some of the arguments (``function``, place), then a launch or an operation on all of them."""

    derived: list[tuple[Callable[[Tensor], Tensor], int]]
    way: Launch | Application

    def __call__(self, tensors: tuple[Tensor, ...]) -> Result | None:
        derived, way = self
        return way((*tensors, *[function(tensors[place]) for function, place in derived]))


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


Way = Launch | Application | Prepared


class Form:
    """Calls with the same names of options and types of arguments: which are tensors, and what is known of those with
    the same values of all others, the same first shape and the same grad mode."""

    def __init__(self, values: tuple) -> None:
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        others = [place for place, value in enumerate(values) if not isinstance(value, Tensor)]
        self.usual = len(places) > 1 and all(type(values[place]) in PLAIN for place in places)
        self.tensors = itemgetter(*places) if self.usual else tuple
        self.others = itemgetter(*others, others[0]) if others else _nothing  # one twice: of two or more it is a tuple
        self.known: dict[tuple, list[tuple[Callable[..., bool], Way | None]]] = {}


def _nothing(values: tuple) -> tuple:
    return ()


def remembered(model: Callable[P, R]) -> Callable[P, R]:
    """The function of tensors and options, whose calls are remembered."""
    forms: dict[tuple, Form] = {}

    @functools.wraps(model)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            return model(*arguments, **options)
        values = (*arguments, *options.values())
        kind = (*options, *map(type, values))
        form = forms.get(kind)
        if form is None:
            form = forms[kind] = Form(values)
        if not form.usual:
            return model(*arguments, **options)
        tensors: Any = form.tensors(values)
        key = (torch.is_grad_enabled(), tensors[0].shape, *form.others(values))
        try:
            known = form.known.get(key)
        except TypeError:  # an option that cannot be hashed
            return model(*arguments, **options)
        if known is not None:
            for fits, way in known:
                if fits(*tensors):
                    result: Any = None if way is None else way(tensors)
                    return model(*arguments, **options) if result is None else result
        if TensorGuards is None or transformed():
            return model(*arguments, **options)
        seen: list[watch.Seen] = []
        token = watch.watched.set(seen)
        try:
            result = model(*arguments, **options)
        finally:
            watch.watched.reset(token)
        if len({tensor.data_ptr() for tensor in tensors}) == len(tensors):  # else: which is meant?
            _remember(form, key, tensors, _way(seen, tensors, options, result))
        return result

    return call


def _remember(form: Form, key: tuple, tensors: tuple[Tensor, ...], way: Way | None) -> None:
    shapes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    fits = TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
    if len(form.known) >= SHAPES:
        form.known.clear()
    form.known[key] = [*form.known.get(key, ())[-MOST:], (fits, way)]


def _way(seen: list[watch.Seen], tensors: tuple[Tensor, ...], options: dict[str, Any], result: Any) -> Way | None:
    """How to do it again: None unless one launch or operation was seen, which had for its tensors the arguments and
    what was derived of them, used all of them and made the result, and nothing but the arguments has a say, neither a
    transform nor autocast nor other ranks."""
    device = tensors[0].device.type
    derived = [each for each in seen if isinstance(each, watch.Derived)]
    others = [each for each in seen if not isinstance(each, watch.Derived)]
    if len(others) != 1 or torch.is_autocast_enabled(device) or type(result) is not Result:
        return None
    if options.get("context_group") is not None:
        return None
    (one,) = others
    applied = isinstance(one, watch.Applied)
    validate = options.get("validate")
    checking = validate is not False and (validate is not None or device == "cpu")
    if checking and not (isinstance(one, watch.Launched) and one.checks):
        return None
    known: dict[Any, int] = {_mark(tensor, applied): place for place, tensor in enumerate(tensors)}
    sources = [known.get(_mark(each.source, applied), -1) for each in derived]
    for each, place in zip(derived, sources, strict=True):
        if place < 0 or each.source.numel() != tensors[place].numel() or not each.result.is_contiguous():
            return None
    known |= {_mark(each.result, applied): len(tensors) + number for number, each in enumerate(derived)}
    count = len(tensors) + len(derived)
    if len(known) < count:  # one tensor twice: which is meant?
        return None
    places = [-1 if tensor is None else known.get(_mark(tensor, applied), -2) for tensor in one.tensors]
    in_place = bool(options.get("in_place"))
    found: Launch | Application | None
    if isinstance(one, watch.Launched):
        found = _launch(one, places, count, in_place, checking, (*tensors, *[each.result for each in derived]), result)
    else:
        found = _application(one, places, count, result)
    if found is None or not set(range(count)) <= {*places, *sources}:
        return None
    return (
        Prepared([(each.function, place) for each, place in zip(derived, sources, strict=True)], found)
        if derived
        else found
    )


def _mark(tensor: Tensor, applied: bool) -> int:
    """What tells whether one tensor is another: its memory; where gradients are recorded, which go through views, that
    it is the same object."""
    return id(tensor) if applied else tensor.data_ptr()


def _application(applied: watch.Applied, places: list[int], count: int, result: Result) -> Application | None:
    if result.output is not applied.output or -2 in places:
        return None
    if not (result.final_state is None or result.final_state is applied.final):
        return None
    order = itemgetter(*[count if place == -1 else place for place in places])
    return Application(applied.function, applied.setting, order, result.final_state is not None)


def _launch(
    launched: watch.Launched,
    places: list[int],
    count: int,
    in_place: bool,
    checking: bool,
    tensors: tuple[Tensor, ...],
    result: Result,
) -> Launch | None:
    """``places`` of what is made anew are found here."""
    output, final = launched.tensors[launched.output], launched.tensors[launched.final]
    assert output is not None
    state, place = result.final_state, places[launched.final]
    if not nothing_to_record(tensors) or not _is(result.output, output) or in_place != (place >= 0):
        return None
    if state is not None and not (state is tensors[place] if in_place else _is(state, final)):
        return None
    places[launched.output] = count
    if final is not None and not in_place:
        places[launched.final] = count + 1
    if -2 in places:
        return None
    again = launched.settle(tuple(places), checking)
    made: Tensor | int | None = place if in_place else None
    if final is not None and not in_place:
        made = _shown(final if state is None else state)
    kind = (result.output.shape, result.output.stride(), output.dtype)
    like = [place for place, tensor in enumerate(tensors) if (tensor.shape, tensor.stride(), tensor.dtype) == kind]
    return Launch(again, like[0] if like else _shown(result.output), made, state is not None)


def _is(result: Tensor, made: Tensor | None) -> bool:
    """Whether a result is what a launch made, if in another shape."""
    if made is None:
        return False
    same = result.data_ptr() == made.data_ptr() and result.numel() == made.numel() and result.dtype == made.dtype
    return same and result.is_contiguous()


def _shown(tensor: Tensor) -> Tensor:
    """Its shape, dtype and device."""
    return tensor.new_empty(1).expand(tensor.shape)
