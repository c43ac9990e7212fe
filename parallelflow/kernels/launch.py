"""Launching kernels with little work on the host.

Triton binds every argument of every launch anew: names, types, options, and one TMA descriptor after another is
encoded; 20 to 140 µs where a kernel may take 20.  Here a kernel with its constants is bound once, what Triton compiled
for it is found by the kinds of the arguments (dtype, alignment, what is absent), and its entry point gets addresses
and descriptors that are encoded already.  The first launch of each kind goes through Triton itself, and so does every
launch in Triton's interpreter and with a Triton whose entry point is not the one known here.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes, or the multiple of a number; Triton compiles another kernel for what is not
KNOWN_ENTRY = "iiiKKppOOOOOO"  # grid, stream, function, two flags, two scratch buffers, metadata, two hooks


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


class Bound:
    """One kernel with its constants and launch options; called, it launches on the current device and stream."""

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        self.compiled: dict[tuple, Compiled | None] = {}

    def __call__(self, programs: int, *arguments: Any) -> None:
        """``arguments`` are what the kernel takes before its constants, in order: tensors, None, numbers, and
        descriptors: triton's, with a hashable ``kind`` and a list ``encoded``, empty at first."""
        if not isinstance(self.kernel, JITFunction):  # the interpreter's
            self.kernel[(programs,)](*arguments, **self.constants)
            return
        device = driver.active.get_current_device()
        kinds: list[Any] = [device]
        values: list[Any] = []
        encoded = True
        for argument in arguments:
            if isinstance(argument, Tensor):
                address = argument.data_ptr()
                values.append(address)
                kinds.append(argument.dtype if address % ALIGNMENT == 0 else (argument.dtype,))
            elif argument is None or isinstance(argument, float):
                values.append(argument)
                kinds.append(type(argument))
            elif isinstance(argument, int):
                values.append(argument)
                kinds.append((argument == 1, argument % ALIGNMENT == 0, -(2**31) <= argument < 2**31))
            else:
                values += argument.encoded
                kinds.append(argument.kind)
                encoded &= bool(argument.encoded)
        key = tuple(kinds)
        compiled = self.compiled.get(key)
        if compiled is None:
            found = self.kernel[(programs,)](*arguments, **self.constants)
            self.compiled[key] = _entry_point(found, self.kernel, self.constants, arguments)
        elif not encoded:
            descriptors = [argument for argument in arguments if hasattr(argument, "encoded")]
            for descriptor, (encode, metadata) in zip(descriptors, compiled.encodings, strict=True):
                descriptor.encoded[:] = encode(descriptor, metadata)
            self(programs, *arguments)
        else:
            stream = driver.active.get_current_stream(device)
            compiled.start(programs, 1, 1, stream, *compiled.before, *values, *compiled.after)


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
