"""CUDA C++ compiled while the program runs, by the NVRTC that comes with PyTorch for CUDA, and launched by the driver.

No CUDA toolkit, no headers and no compiler of the system are needed. What is not there, or fails, raises
``Unavailable`` with what was said.
"""

from __future__ import annotations

import ctypes
import glob
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

LARGEST_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Unavailable(RuntimeError):
    """There is no compiled kernel, and why."""


@cache
def _compiler() -> ctypes.CDLL:
    """NVRTC, of PyTorch's own CUDA version if it can be had."""
    major = (torch.version.cuda or "13").split(".")[0]
    packaged = [os.path.join(folder, "nvidia", "*", "lib", f"libnvrtc.so.{major}") for folder in sys.path]
    found = [path for pattern in packaged for path in sorted(glob.glob(pattern))]
    for name in [*found, f"libnvrtc.so.{major}"]:
        try:
            for builtins in glob.glob(os.path.join(os.path.dirname(name), f"libnvrtc-builtins.so.{major}*")):
                ctypes.CDLL(builtins)  # NVRTC looks for it by its name alone, which finds what is loaded
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Unavailable(f"no libnvrtc.so.{major}, expected the one that PyTorch for CUDA {major} installs")


def available() -> bool:
    """Whether kernels can be compiled here."""
    try:
        _compiler()
    except Unavailable:
        return False
    return True


def compile_cubin(source: str, headers: dict[str, str], architecture: str) -> bytes:
    """Machine code for ``sm_90`` or another ``architecture``; ``headers`` are what ``source`` includes, by name.

    Raises:
        Unavailable: there is no NVRTC, or it refuses the source; with what it said.
    """
    nvrtc, program = _compiler(), ctypes.c_void_p()

    def check(status: int, what: str) -> None:
        if status:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise Unavailable(f"NVRTC, {what}: {nvrtc.nvrtcGetErrorString(status).decode()}")

    def strings(of: Sequence[str]) -> Any:
        return (ctypes.c_char_p * len(of))(*[text.encode() for text in of])

    texts, names = strings(list(headers.values())), strings(list(headers))
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"parallelflow.cu", len(headers), texts, names
    )
    check(created, "a new program")
    try:
        options = ["--std=c++17", f"--gpu-architecture={architecture}"]
        status = nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
        if status:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            said = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, said)
            raise Unavailable(f"NVRTC does not compile the kernel:\n{said.value.decode()[-2000:]}")
        size = ctypes.c_size_t()
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "the size of the machine code")
        cubin = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, cubin), "the machine code")
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"no CUDA driver: {error}") from None


def _check(status: int) -> None:
    if status:
        said = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(said))
        raise RuntimeError(f"CUDA driver: {(said.value or b'unknown error').decode()}")


class Kernel:
    """A kernel on one device."""

    def __init__(self, cubin: bytes, name: str, device: int, shared_bytes: int) -> None:
        driver = _driver()
        self.device, self.shared_bytes = device, shared_bytes
        self.context, handle = ctypes.c_void_p(), ctypes.c_int()
        _check(driver.cuDeviceGet(ctypes.byref(handle), device))
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(self.context), handle))  # PyTorch's own, kept to the end
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self._enter()
        _check(driver.cuModuleLoadData(ctypes.byref(module), cubin))
        _check(driver.cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()))
        _check(driver.cuFuncSetAttribute(self.function, LARGEST_SHARED_MEMORY, shared_bytes))

    def _enter(self) -> None:
        """A thread that has done nothing on the device yet, such as one of autograd's, has no context."""
        current = ctypes.c_void_p()
        _check(_driver().cuCtxGetCurrent(ctypes.byref(current)))
        if current.value != self.context.value:
            _check(_driver().cuCtxSetCurrent(self.context))

    def launch(self, blocks: int, threads: int, *arguments: ctypes._SimpleCData) -> None:
        """On the device's current stream; the caller has made the device the current one."""
        self._enter()
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(each) for each in arguments])
        _check(_driver().cuLaunchKernel(
            self.function, blocks, 1, 1, threads, 1, 1, self.shared_bytes, stream, pointers, None
        ))  # fmt: skip


def read_sources(folder: Path) -> dict[str, str]:
    """The files of a folder by name."""
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}
