"""Launching kernels with little work on the host.

Triton binds every argument of every launch anew: names, types, options, and one TMA descriptor after another is
encoded; 20 to 140 µs where a kernel may take 20.  Here a kernel with its constants is bound once, what Triton compiled
for it is found by the kinds of the arguments (dtype, alignment, what is absent), and its entry point gets addresses
and descriptors that are encoded already.  The first launch of each kind goes through Triton itself, and so does every
launch in Triton's interpreter and with a Triton whose entry point is not the one known here.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, reduce
from itertools import chain
from operator import attrgetter, itemgetter, or_
from typing import Any, NamedTuple

from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .recording import ALIGNMENT, Device, recording

LARGEST_NUMBER = 2**31 - 1  # beyond, Triton compiles a kernel for 64 bits
KNOWN_ENTRY = "iiiKKppOOOOOO"  # grid, stream, function, two flags, two scratch buffers, metadata, two hooks

_dtype, _kind, _encoded = attrgetter("dtype"), attrgetter("kind"), attrgetter("encoded")
_address = Tensor.data_ptr


class Encoding(NamedTuple):
    """How Triton's compiler wants a descriptor encoded, and its function that does it."""

    encode: Callable[[Any, Any], Sequence[Any]]
    metadata: Any


class Compiled(NamedTuple):
    """A loaded kernel: its entry point, what it takes before and after the arguments, its descriptors' encodings."""

    start: Callable[..., None]
    before: tuple
    after: tuple
    encodings: tuple[Encoding, ...]


def _no_integers(arguments: tuple) -> tuple[int, ...]:
    return (0,)


class Pattern:
    """Launches of one kernel whose arguments have the same types: where tensors, descriptors and integers stand, and
    what Triton compiled for each set of dtypes."""

    def __init__(self, kernel: Any, arguments: tuple) -> None:
        places = [place for place, argument in enumerate(arguments) if isinstance(argument, Tensor)]
        integers = [place for place, argument in enumerate(arguments) if isinstance(argument, int)]
        self.descriptors = sum(hasattr(argument, "encoded") for argument in arguments)
        self.places = places
        self.tensors = itemgetter(*places, places[0])  # one twice: of two or more it is a tuple
        self.integers = itemgetter(*integers, integers[0]) if integers else _no_integers
        self.chosen_by = [place for place in integers if not kernel.params[place].do_not_specialize]
        self.compiled: dict[tuple, Compiled | None] = {}

    def key(self, device: int, tensors: tuple[Tensor, ...], arguments: tuple) -> tuple:
        """What chooses among the compiled, for aligned tensors."""
        key = (device, *map(_dtype, tensors), *map(_kind, arguments[: self.descriptors]))
        for place in self.chosen_by:
            key += (arguments[place] == 1, arguments[place] % ALIGNMENT == 0)
        return key


class Settled(NamedTuple):
    """A launch of which all is settled but its tensors' addresses. ``rest`` is what else the entry point takes, and
    ``order`` picks its arguments from the addresses and those."""

    start: Callable[..., None]
    programs: int
    device: Device
    rest: tuple
    order: Callable[[tuple], tuple]

    def __call__(self, tensors: tuple[Tensor, ...]) -> bool:
        """Launches on the current stream; False, and nothing done, if an address is not aligned or another device is
        the current one."""
        start, programs, (number, current, current_stream), rest, order = self
        addresses = tuple(map(_address, tensors))
        if reduce(or_, addresses) % ALIGNMENT or current() != number:
            return False
        start(programs, 1, 1, current_stream(number), *order(addresses + rest))
        return True


class Bound:
    """One kernel with its constants and launch options; called, it launches on the current device and stream."""

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        self.patterns: dict[tuple, Pattern] = {}

    def __call__(self, programs: int, *arguments: Any) -> None:
        """``arguments`` are what the kernel takes before its constants, in order: descriptors (triton's, with a
        hashable ``kind`` and a list ``encoded``, empty at first), then tensors, None and numbers."""
        types = tuple(map(type, arguments))
        pattern = self.patterns.get(types)
        if pattern is None:
            if not isinstance(self.kernel, JITFunction):  # the interpreter's
                self.kernel[(programs,)](*arguments, **self.constants)
                recording.incomplete()
                return
            pattern = self.patterns[types] = Pattern(self.kernel, arguments)
        tensors, count = pattern.tensors(arguments), pattern.descriptors
        addresses = list(map(_address, tensors))
        device = driver.active.get_current_device()
        key = pattern.key(device, tensors, arguments)
        usual = not reduce(or_, addresses) % ALIGNMENT and max(pattern.integers(arguments)) <= LARGEST_NUMBER
        compiled = pattern.compiled.get(key) if usual else None
        if compiled is None:
            found = self.kernel[(programs,)](*arguments, **self.constants)
            recording.incomplete()
            if usual:
                pattern.compiled[key] = _entry_point(found, self.kernel, self.constants, arguments)
            return
        values = list(arguments)
        for place, address in zip(pattern.places, addresses):  # noqa: B905
            values[place] = address
        if count:
            for descriptor, (encode, metadata) in zip(arguments, compiled.encodings):  # noqa: B905
                if not descriptor.encoded:
                    descriptor.encoded[:] = encode(descriptor, metadata)
            values[:count] = chain.from_iterable(map(_encoded, arguments[:count]))
        stream = driver.active.get_current_stream(device)
        handed = (*compiled.before, *values, *compiled.after)
        compiled.start(programs, 1, 1, stream, *handed)
        if recording.recorder is not None:
            at, encoded = _positions(compiled, pattern, arguments)
            whose = list(zip(at, tensors, strict=False))  # the last one is there for the itemgetter
            recording.recorder.launched(compiled.start, programs, handed, whose, encoded)

    def settled(
        self, programs: int, tensors: tuple[Tensor | None, ...], numbers: tuple, places: tuple[int, ...]
    ) -> Settled | None:
        """This launch for tensors that take the place of these: ``places`` has for each its place among those that will
        be given, in which all are used, or -1 for None. Only once it is compiled, and where its entry point is known.
        """
        arguments = (*tensors, *numbers)
        pattern = self.patterns.get(tuple(map(type, arguments)))
        if pattern is None or max(pattern.integers(arguments)) > LARGEST_NUMBER:
            return None
        device = Device.now()
        compiled = pattern.compiled.get(pattern.key(device.number, pattern.tensors(arguments), arguments))
        if compiled is None or pattern.descriptors:
            return None
        rest = (None, *compiled.before, *numbers, *compiled.after)
        given = max(places) + 1
        absent, before = given, given + 1
        after = before + len(compiled.before)
        order = (*range(before, after), *[absent if place < 0 else place for place in places],
                 *range(after, given + len(rest)))  # fmt: skip
        return Settled(compiled.start, programs, device, rest, itemgetter(*order))


def _positions(compiled: Compiled, pattern: Pattern, arguments: tuple) -> tuple[list[int], list[tuple]]:
    """Where addresses stand among what the entry point gets after the stream; where descriptors do, with these and how
    they are encoded."""
    place, encoded = len(compiled.before), []
    for descriptor, encoding in zip(arguments, compiled.encodings, strict=False):
        encoded.append((place, descriptor, encoding))
        place += len(descriptor.encoded)
    shift = place - pattern.descriptors
    return [at + shift for at in pattern.places], encoded


@cache
def bind(kernel: Any, **constants: Any) -> Bound:
    """A kernel with its constants and launch options (``num_warps``, …): the same object for the same ones."""
    return Bound(kernel, constants)


def _entry_point(found: Any, kernel: Any, constants: dict[str, Any], arguments: tuple) -> Compiled | None:
    """The way into a kernel that Triton has compiled and loaded; None where it is not the known one."""
    try:
        from triton.backends.nvidia import driver as nvidia
    except ImportError:
        return None
    launcher = found.run
    if getattr(nvidia, "_BASE_ARGS_FORMAT", None) != KNOWN_ENTRY or not isinstance(launcher, nvidia.CudaLauncher):
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    start, encodings = launcher.launch, getattr(found.metadata, "tensordesc_meta", None) or []
    if inspect.isfunction(start):  # Triton's wrapper, which encodes the descriptors and calls the entry point
        start = inspect.getclosurevars(start).nonlocals.get("launcher")
    if not inspect.isbuiltin(start) or len(encodings) != sum(hasattr(argument, "encoded") for argument in arguments):
        return None
    flags = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    names = kernel.arg_names[len(arguments) :]
    return Compiled(
        start,
        (found.function, *flags, None, None, found.packed_metadata, None, None, None),
        tuple(constants[name] for name in names),
        tuple(Encoding(nvidia.make_tensordesc_arg, metadata) for metadata in encodings),
    )
