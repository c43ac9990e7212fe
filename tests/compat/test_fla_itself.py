"""Beside flash-linear-attention itself: its signatures, and its kernels, which Triton's interpreter runs on a CPU."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.check_fla import NAMES
from parallelflow.compat import fla

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.prefix) / "beside"
"""Where ``make venv`` puts FLA: out of the other tests' sight."""

if not (BESIDE / "fla").is_dir() and importlib.util.find_spec("fla") is None:
    pytest.skip("flash-linear-attention is not installed: make venv", allow_module_level=True)

COSTLY = ("chunk_kda", "chunk_gdn2", "chunk_rwkv7", "chunk_dplr_delta_rule")
SHARES = {"costly": COSTLY, "others": tuple(name for name in NAMES if name not in COSTLY)}
ASKED = {**SHARES, "about": ("signatures", "states", "install", "layers", "context", "transformers")}


@pytest.fixture(scope="module")
def told():
    """What FLA's processes print, one for each of ``ASKED``, side by side: lists of JSON objects."""
    path = os.pathsep.join([str(ROOT), str(BESIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                   "FLA_CACHE_RESULTS": "0", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.compat.fla_itself", *asked], env=environment, cwd=ROOT, **pipes
        )
        for name, asked in ASKED.items()
    }
    found = {}
    for name, process in started.items():
        output, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
        found[name] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return found


def test_signatures(told):
    """FLA's parameters, order and defaults; by name, exactly what FLA reads from its ``**kwargs``."""
    rows = {row["signature"]: row for row in told["about"] if "signature" in row}
    assert set(rows) == {name for names in fla.FAMILIES.values() for name in names}
    for name, row in rows.items():
        parameters = inspect.signature(getattr(fla, name)).parameters.values()
        ours = [
            [p.name, "required" if p.default is p.empty else repr(p.default)]
            for p in parameters
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert ours == row["parameters"], name
        further = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert further == set(row["read"]) - {"head_first"}, name  # FLA reads head_first to refuse it
        assert row["further"] or not further


@pytest.mark.parametrize("share", SHARES)
def test_kernels(told, share):
    """Outputs, states and gradients of every function: defaults, packed with every switch on, gates inside."""
    for name in SHARES[share]:
        own = [row for row in told[share] if row["function"] == name]
        assert len(own) >= 2
        for row in own:
            assert row["agrees"], row
            assert "gradient" in row or "NotImplemented" in row["fla"] or "does not require grad" in row["fla"], row


def test_states_between_chunks(told):
    rows = [row for row in told["about"] if "states" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["results"] == [3, 3]
        assert row["states"][0] == row["states"][1]
        assert row["error"] < 2**-10  # both are rounded to float16


def test_install_in_the_library_itself(told):
    assert {"installed": True} in told["about"]


def test_flas_own_layers(told):
    rows = [row for row in told["about"] if "layer" in row]
    assert len(rows) == 9
    for row in rows:
        assert row["functions"], row
        assert row["replaced"], row
        assert row["error"] < 2**-9, row  # of float16 2^-11 a rounding, on both sides


def test_contexts_of_ranks(told):
    rows = [row for row in told["about"] if "line" in row]
    assert len(rows) == 16
    assert all(row["line"] == row["starts"] for row in rows), rows


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="what it has without FLA cannot be known here")
def test_accelerated_models_run_where_flas_kernels_do_not(told):
    """Transformers prefers FLA's kernels wherever FLA is; accelerated, the logits are those that it has without FLA."""
    pytest.importorskip("transformers")
    from tests.compat.test_transformers import build, prompt

    row = next(row for row in told["about"] if "logits" in row)
    assert row["taken"].startswith("fla.ops")
    with torch.no_grad():
        expected = build("qwen3_next")(prompt(9)).logits[0, -1]
    torch.testing.assert_close(
        torch.tensor(row["logits"]), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
    )
