"""The solvers that work row by row, ``sigdelta`` and ``substitution``, as CUDA kernels.

source/      the kernels: CUDA C++ that is plain C++ as well, and is tested as such on a CPU
layout.py    how a system is laid over a thread block
nvrtc.py     compiling and launching, with nothing but PyTorch for CUDA installed
solve.py     the kernels as factorisations
"""

from __future__ import annotations

from parallelflow.solvers.cuda.solve import COMPILED, refusal

__all__ = ["COMPILED", "refusal"]
