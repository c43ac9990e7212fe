"""Bytes to train on: the sources of Python's standard library, which every machine has, or a file of one's own."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

STANDARD_LIBRARY = "Python's standard library"
LEAST_BYTES = 8192
MOST_BYTES = 8 * 1024**2
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings"}


class Corpus(NamedTuple):
    """Training and held-out bytes, uint8 [N], and where they are from."""

    training: Tensor
    held_out: Tensor
    source: str

    def batch(self, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random training windows: bytes [size, length] and the bytes that follow each."""
        return windows(self.training, size, length, generator)

    def held_out_batch(self, size: int, length: int) -> tuple[Tensor, Tensor]:
        """The same held-out windows at every call."""
        return windows(self.held_out, size, length, torch.Generator().manual_seed(0))


def windows(data: Tensor, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - length, (size, 1), generator=generator)
    taken = data[starts + torch.arange(length + 1)].long()
    return taken[:, :-1], taken[:, 1:]


def read_corpus(file: Path | None = None) -> Corpus:
    """The first `MOST_BYTES` of `file`, or of the standard library: the last tenth of them is held out.

    Raises:
        ValueError: for a file that is missing, a folder, unreadable, or shorter than `LEAST_BYTES`.
    """
    data = _standard_library() if file is None else _read(file)
    if len(data) < LEAST_BYTES:
        where = "the standard library" if file is None else str(file)
        what = "is empty" if not data else f"holds {len(data):,} bytes"
        raise ValueError(f"data: {where} {what}, expected at least {LEAST_BYTES:,} bytes to train on")
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    cut = len(tensor) * 9 // 10
    source = STANDARD_LIBRARY if file is None else file.name
    return Corpus(tensor[:cut], tensor[cut:], source)


def _read(file: Path) -> bytes:
    if not file.exists():
        raise ValueError(f"data: got {file}, which does not exist")
    if file.is_dir():
        raise ValueError(f"data: got {file}, which is a folder, expected a file")
    try:
        with file.open("rb") as stream:
            return stream.read(MOST_BYTES)
    except OSError as error:
        raise ValueError(f"data: {file} cannot be read: {error.strerror or error}") from error


def _standard_library() -> bytes:
    """The library's modules, whole, in an order that is shuffled but always the same."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    random.Random(0).shuffle(modules)
    if not modules:
        raise ValueError(f"data: found no Python sources under {root}, expected the standard library's; give a file")
    parts, size = [], 0
    for path in modules:
        part = path.read_bytes()
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            break
    return b"\n".join(parts)[:MOST_BYTES]
