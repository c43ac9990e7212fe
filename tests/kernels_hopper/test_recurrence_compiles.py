"""The kernel for short sequences compiles for Hopper with nothing spilled and its state in loads of 16 bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = (
    "linear_attention,128,128,1,fp32",
    "gated_delta_rule,128,128,1,fp32",
    "gated_delta_rule,128,128,1,bf16",
    "gated_delta_rule,128,128,16,fp32",
    "kimi_delta_attention,128,128,1,fp32",
    "comba,128,128,1,fp32",
    "delta_product,128,128,4,fp32",
    "rwkv7,64,64,1,fp32",
    "low_rank_flow,128,128,4,fp32",
    "low_rank_flow,512,512,4,fp32",
)


def test_nothing_is_spilled():
    folder = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, folder / "recurrence_launches.py", *CASES], cwd=folder.parents[1], text=True,
        env={**os.environ, "PYTHONPATH": str(folder.parents[1])}, capture_output=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    lines = [line.split(" | ") for line in found.stdout.splitlines()]
    assert [case for case, *_ in lines] == list(CASES)
    for case, spilled, loads, stores in lines:
        assert int(spilled) == 0, case
        assert min(int(loads), int(stores)) >= 4, case  # a tile of 4096 numbers over 128 threads is 8, in 16 bits 4
