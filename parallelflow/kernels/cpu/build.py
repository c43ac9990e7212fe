"""The compiled library: made at first use by the system's C++ compiler, and kept in the user's cache.

``PARALLELFLOW_CACHE`` names another folder, ``CXX`` another compiler. A library is found again by its sources, its
compiler and the machine's instruction set.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")


class Unavailable(RuntimeError):
    """There is no compiled library, and why."""


def _compiler() -> str | None:
    """The C++ compiler, on a system whose libraries it makes; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


COMPILER = _compiler()  # once: looking for it in a call would break a compiled graph


@cache
def library() -> ctypes.CDLL:
    """The library, compiled if this machine has not done so yet (some 8 s).

    Raises:
        Unavailable: no compiler, or it failed; with what it said.
    """
    if COMPILER is None:
        raise Unavailable("no C++ compiler, expected c++, g++ or clang++ on Linux, or CXX to name one")
    sources = sorted(SOURCE.iterdir())
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256("\n".join([version, *FLAGS, _instruction_set()]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = _folder() / f"flow-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _compile(COMPILER, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise Unavailable(f"the compiled library does not load: {error}") from None


@cache
def usable() -> bool:
    """Whether the library is there or can be made. A compiler that fails is told of once, as a warning."""
    try:
        library()
    except Unavailable as error:
        warnings.warn(f"parallelflow: CPU kernels are not available, the torch backend runs: {error}", stacklevel=2)
        return False
    return True


def _compile(command: str, target: Path) -> None:
    """Beside the target, then renamed: another process finds a whole library or none."""
    descriptor, made = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(descriptor)
    try:
        found = subprocess.run([command, *FLAGS, str(SOURCE / "flow.cpp"), "-o", made], capture_output=True, text=True,
                               check=False)  # fmt: skip
        if found.returncode:
            raise Unavailable(f"{command} failed:\n{found.stderr[-2000:]}")
        os.replace(made, target)
    finally:
        Path(made).unlink(missing_ok=True)


def _folder() -> Path:
    """Where compiled libraries are kept: a folder of the user's own, or one of this process's."""
    named = os.environ.get("PARALLELFLOW_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "parallelflow"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    except OSError:
        pass
    if named:
        raise Unavailable(f"PARALLELFLOW_CACHE: got {named!r}, expected a folder that can be written")
    return Path(tempfile.mkdtemp(prefix="parallelflow-"))


def _instruction_set() -> str:
    """The processor's features, as Linux tells them: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {told}"
