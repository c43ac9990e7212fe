"""The CUDA solvers' own source, compiled as plain C++: a thread block as loops over its threads (``block.cpp``)."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.kernels.cpu.build import COMPILER
from parallelflow.solvers.cuda.layout import WIDTH, Layout
from parallelflow.solvers.cuda.solve import SOURCE

HERE = Path(__file__).parent
HOPPER = 232448  # bytes of shared memory a block may take
TYPES = {"float": torch.float32, "double": torch.float64, "Counted": torch.float64, "BFloat16": torch.bfloat16}


class Counts(NamedTuple):
    """Of one system and one tile of columns, from the source that runs: additions and multiplications, the longest
    chain of them that wait for each other, and barriers, of which one is before the first stage and one after the
    last."""

    operations: int
    chain: int
    barriers: int

    @property
    def stages(self) -> int:
        return self.barriers - 2


def layout_of(solver: str, number_bytes: int, tokens: int, rank: int, shared: int = HOPPER) -> Layout:
    """The layout for many systems."""
    return Layout.of(solver, number_bytes, tokens, rank, shared, WIDTH[solver][number_bytes])


@cache
def library(definitions: tuple[tuple[str, str], ...]) -> ctypes.CDLL:
    folder = tempfile.mkdtemp(prefix="parallelflow-solvers-")
    made = Path(folder) / "block.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{SOURCE}"]
    options += [f"-D{name}={value}" for name, value in definitions if name != "BLOCK_WARPS"]
    assert COMPILER is not None
    subprocess.run([COMPILER, *options, str(HERE / "block.cpp"), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


def solve(
    gram: Tensor, right: Tensor, layout: Layout, *, number: str = "double", element: str = "double",
    transposed: bool = False,
) -> tuple[Tensor, Counts]:  # fmt: skip
    """``gram [systems, n, n]`` float64, ``right [systems, n, D]`` of the type ``element``, arithmetic in ``number``."""
    systems, rows, columns = right.shape
    assert right.dtype == TYPES[element]
    assert gram.dtype == torch.float64
    gram, right = gram.contiguous(), right.contiguous()
    solution, counts = torch.empty_like(right), (ctypes.c_longlong * 3)()
    definitions = tuple(layout.definitions(number, element).items())
    changed = library(definitions).solve(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (gram, right, solution)),
        systems, layout.tokens, rows, columns, int(transposed), layout.warps, layout.memory, counts,
    )  # fmt: skip
    assert changed == 0, f"{changed} numbers written past the shared memory"
    return solution, Counts(*counts)
