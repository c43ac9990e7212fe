"""``(I - G) X = Z`` by a CUDA kernel: one launch for all chunks and heads, whatever their number."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from parallelflow.solvers.base import Factorisation
from parallelflow.solvers.cuda import nvrtc
from parallelflow.solvers.cuda.layout import MOST_RANK, MOST_ROWS, Layout

SOURCE = Path(__file__).parent / "source"
KERNELS = {"sigdelta": "SigDelta", "substitution": "Substitution"}
NUMBERS = {torch.float32: "float", torch.float64: "double"}
ELEMENTS = NUMBERS | {torch.bfloat16: "BFloat16", torch.float16: "Float16"}


def refusal(name: str, device: torch.device, tokens: int, rank: int) -> str | None:
    """Why no kernel solves chunks of ``tokens`` with ``rank`` rows each on ``device``; None where one does."""
    if name not in KERNELS:
        return f"solver={name!r}, expected one of {', '.join(map(repr, sorted(KERNELS)))}"
    if device.type != "cuda":
        return f"tensors on {device}, expected a CUDA device"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "another GPU, expected one of NVIDIA of compute capability 8.0 or later"
    if rank == 0:
        return "no rows that read, expected at least one: there is nothing to solve"
    if rank > MOST_RANK:
        return f"{rank} rows a token at once, expected at most {MOST_RANK}"
    if tokens * rank > MOST_ROWS:
        return f"chunks of {tokens * rank} rows, expected at most {MOST_ROWS}"
    if not torch.compiler.is_compiling() and not nvrtc.available():
        return "no NVRTC, expected the one that PyTorch for CUDA installs"
    return None


class Compiled(Factorisation):
    """``G [..., n, n]`` itself, in float32 or float64, which all arithmetic is in; everything happens in the solve.

    Nothing here is recorded for gradients: the engine's own backward pass is what solves with the transpose.
    """

    def __init__(self, name: str, gram: Tensor, block: int) -> None:
        if gram.dtype not in NUMBERS:
            raise TypeError(f"gram: got {gram.dtype}, expected float32 or float64")
        why = refusal(name, gram.device, gram.shape[-1] // block, block)
        if why is not None:
            raise ValueError(f"gram: got {why}")
        self.name, self.gram, self.block, self.dtype = name, gram, block, gram.dtype

    def solve(self, right: Tensor) -> Tensor:
        """``X`` with ``(I - G) X = right``, in the dtype of ``right``: 16 bits, float32 or float64."""
        return self._launch(right, False)

    def solve_transposed(self, right: Tensor) -> Tensor:
        """``Y`` with ``(I - G)ᵀ Y = right``, in the dtype of ``right``."""
        return self._launch(right, True)

    def apply(self, right: Tensor) -> Tensor:
        return self.solve(right)

    def __getitem__(self, index: slice | Tensor) -> Compiled:
        part = object.__new__(Compiled)
        part.name, part.gram, part.block, part.dtype = self.name, self.gram[index], self.block, self.dtype
        return part

    def _launch(self, right: Tensor, transposed: bool) -> Tensor:
        gram, (rows, columns) = self.gram, right.shape[-2:]
        if right.dtype not in ELEMENTS:
            raise TypeError(f"right: got {right.dtype}, expected {', '.join(map(str, ELEMENTS))}")
        if rows != gram.shape[-1] or right.device != gram.device:
            raise ValueError(
                f"right: got {rows} rows on {right.device}, expected {gram.shape[-1]} on {gram.device} as of gram"
            )
        if torch.is_grad_enabled() and (gram.requires_grad or right.requires_grad):
            raise RuntimeError("right: got a system that autograd records, expected none: the kernel is not recorded")
        batch = torch.broadcast_shapes(gram.shape[:-2], right.shape[:-2])
        gram = gram.expand(*batch, rows, rows).contiguous()
        right = right.expand(*batch, rows, columns).contiguous()
        solution = torch.empty_like(right)
        if not solution.numel():
            return solution
        device = gram.device.index
        with torch.cuda.device(device):
            width = Layout.width_of(KERNELS[self.name], gram.element_size(), solution.numel() // rows, _size(device))
            kernel, layout = _kernel(self.name, gram.dtype, right.dtype, rows // self.block, self.block, width, device)
            tiles = -(-columns // layout.columns)
            numbers = [ctypes.c_int(x) for x in (layout.tokens, rows, columns, tiles, transposed)]
            addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (gram, right, solution)]
            blocks = solution.numel() // (rows * columns) * tiles
            kernel.launch(blocks, 32 * layout.warps, *addresses, *numbers)
        return solution


@cache
def _kernel(
    name: str, number: torch.dtype, element: torch.dtype, tokens: int, rank: int, width: int, device: int
) -> tuple[nvrtc.Kernel, Layout]:
    """A system's kernel and layout; chunks that are laid out alike share the machine code."""
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    layout = Layout.of(KERNELS[name], number.itemsize, tokens, rank, shared_bytes, width)
    cubin = machine_code(layout, number, element, f"sm_{properties.major}{properties.minor}")
    return nvrtc.Kernel(cubin, "solve", device, layout.memory * number.itemsize), layout


@cache
def _size(device: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def machine_code(layout: Layout, number: torch.dtype, element: torch.dtype, architecture: str) -> bytes:
    """``kernel.cu`` compiled for a layout, as ``sm_90`` or another architecture."""
    return _compiled(tuple(layout.definitions(NUMBERS[number], ELEMENTS[element]).items()), architecture)


@cache
def _compiled(definitions: tuple[tuple[str, str], ...], architecture: str) -> bytes:
    headers = nvrtc.read_sources(SOURCE)
    defined = "".join(f"#define {name} {value}\n" for name, value in definitions)
    return nvrtc.compile_cubin(defined + headers.pop("kernel.cu"), headers, architecture)


def sigdelta(gram: Tensor, block: int) -> Factorisation:
    """The solver ``sigdelta`` as a CUDA kernel."""
    return Compiled("sigdelta", gram, block)


def substitution(gram: Tensor, block: int) -> Factorisation:
    """The solver ``substitution`` as a CUDA kernel."""
    return Compiled("substitution", gram, block)


COMPILED = {"sigdelta": sigdelta, "substitution": substitution}
