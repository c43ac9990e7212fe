"""Entry points of kernels without a GPU: what gets addresses, as a compiled kernel does, and runs Triton's
interpreter on what lies there. So launches that are recorded, moved and made again do their work on a CPU."""

import ctypes
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from parallelflow.kernels import launch, recording


def there(address: int, dtype: torch.dtype) -> torch.Tensor:
    """What begins at an address."""
    return torch.frombuffer((ctypes.c_char * 16).from_address(address), dtype=dtype)


def entry_point(found, kernel, constants, arguments):
    """Of a kernel for such arguments."""
    dtypes = [argument.dtype if isinstance(argument, torch.Tensor) else None for argument in arguments]

    def start(programs, _, __, stream, *values):
        with _disable_current_modes():  # a GPU's launch makes no tensors
            own = [
                value if dtype is None else torch.empty(0, dtype=dtype) if value == 0 else there(value, dtype)
                for value, dtype in zip(values, dtypes, strict=True)
            ]
            kernel[(programs,)](*own, **constants)

    return launch.Compiled(start, (), (), ())


def install(patch) -> None:
    """For the time of a test: the first launch of a kind is the interpreter's own, later ones go by address."""
    params = property(lambda self: [SimpleNamespace(do_not_specialize=True) for _ in self.arg_names])
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    patch.setattr(InterpretedFunction, "params", params, raising=False)
    patch.setattr(launch, "JITFunction", InterpretedFunction)
    patch.setattr(launch, "_entry_point", entry_point)
    for module in (launch, recording):
        patch.setattr(module, "driver", SimpleNamespace(active=active))
