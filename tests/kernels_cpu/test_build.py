"""The compiled library: kept, shared by processes, and done without where it cannot be made."""

import os
import subprocess
import sys

import pytest

from parallelflow.kernels.cpu import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler")

RUN = """
import torch, warnings
import parallelflow as pf
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    x = torch.randn(1, 4, 1, 8)
    for _ in range(2):
        pf.delta_rule(x, x, x, torch.rand(1, 4, 1))
print(len([w for w in told if "CPU kernels" in str(w.message)]), *[w.message for w in told])
pf.delta_rule(x, x, x, torch.rand(1, 4, 1), backend="cpu")
"""


def run(**environment):
    return subprocess.run(
        [sys.executable, "-c", RUN], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_it_is_compiled_once_and_found_again(tmp_path):
    first = run(PARALLELFLOW_CACHE=str(tmp_path))
    assert first.returncode == 0, first.stderr
    (made,) = tmp_path.iterdir()
    stamp = made.stat().st_mtime_ns
    assert run(PARALLELFLOW_CACHE=str(tmp_path)).returncode == 0
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [stamp]


def test_a_compiler_that_fails_is_told_of_once(tmp_path):
    """The torch backend runs then; the forced backend says why it cannot."""
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho cannot compile >&2\nexit 1\n")
    broken.chmod(0o755)
    found = run(PARALLELFLOW_CACHE=str(tmp_path / "cache"), CXX=str(broken))
    assert found.stdout.startswith("1 ")
    assert "cannot compile" in found.stdout
    assert "backend: got 'cpu' with no compiled library here" in found.stderr
    assert not list((tmp_path / "cache").iterdir())


def test_no_compiler_is_no_error(tmp_path):
    found = run(CXX="/nowhere/c++")
    assert found.stdout.startswith("0")
    assert "backend: got 'cpu' with no compiled library here" in found.stderr


def test_a_cache_that_cannot_be_written_is_told_of():
    found = run(PARALLELFLOW_CACHE="/proc/nowhere")
    assert found.stdout.startswith("1 ")
    assert "PARALLELFLOW_CACHE: got '/proc/nowhere'" in found.stdout
