"""Compile Gluon kernels for compute capability 9.0 without a GPU."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="session")
def compile_for_hopper():
    """compile_for_hopper(kernel, signature, constants, registers, warps=4) -> Resources, in a process of its own that
    is without Triton's interpreter, which other tests need."""
    from gluon_launches import compile_gluon

    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        patch.delenv("TRITON_INTERPRET", raising=False)
        pool.submit(os.getpid).result()  # the process is there, and the variable may come back
        patch.undo()

        def build(kernel, signature, constants, registers, warps=4):
            where = kernel.fn.__module__, kernel.fn.__qualname__
            return pool.submit(compile_gluon, *where, signature, constants, registers, warps).result()

        yield build
