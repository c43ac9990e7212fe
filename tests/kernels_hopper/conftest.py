"""Gluon kernels compiled for compute capability 9.0 without a GPU, and what ptxas says of them (``compiler.py``)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


class Resources(NamedTuple):
    """What one compiled kernel asks of a multiprocessor, the numbers of ptxas's remarks, and the instructions that read
    a uniform register which nothing has written."""

    shared_bytes: int
    spilled_bytes: int
    remarks: list[str]
    unwritten: list[str]


@pytest.fixture(scope="session")
def compile_for_hopper(tmp_path_factory):
    """compile_for_hopper(kernel, signature, constants, registers, warps=4) -> Resources."""
    folder, errors = Path(__file__).parent, tmp_path_factory.mktemp("hopper") / "errors"
    with errors.open("w") as complaints:
        compiler = subprocess.Popen(
            [sys.executable, folder / "compiler.py"], cwd=folder.parents[1], text=True, stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(folder.parents[1])}, stdout=subprocess.PIPE, stderr=complaints,
        )  # fmt: skip
    assert compiler.stdin is not None
    assert compiler.stdout is not None

    def build(kernel, signature, constants, registers, warps=4):
        wanted = [kernel.fn.__module__, kernel.fn.__name__, signature, constants, registers, warps]
        print(json.dumps(wanted), file=compiler.stdin, flush=True)
        answer = compiler.stdout.readline()
        assert answer, errors.read_text()
        return Resources(*json.loads(answer))

    yield build
    compiler.stdin.close()
    compiler.wait()
