"""The kernel for short sequences compiles for Hopper with nothing spilled and its state in loads of 16 bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = (
    "linear_attention,128,128,1,fp32,slots",
    "gated_delta_rule,128,128,1,fp32,slots",
    "gated_delta_rule,128,128,1,bf16,slots",
    "gated_delta_rule,128,128,1,bf16,accepted",
    "gated_delta_rule,128,128,16,fp32,accepted",
    "gated_delta_rule,128,128,16,fp32,packed",
    "gated_delta_rule,128,128,16,fp32,new",
    "gated_delta_rule,128,128,16,fp32,fresh",
    "kimi_delta_attention,128,128,1,fp32,slots",
    "comba,128,128,1,fp32,slots",
    "delta_product,128,128,4,fp32,slots",
    "rwkv7,64,64,1,fp32,slots",
    "low_rank_flow,128,128,4,fp32,slots",
    "low_rank_flow,512,512,4,fp32,slots",
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
        least = 0 if case.endswith("fresh") else 4  # a tile of 4096 numbers over 128 threads is 8, in 16 bits 4
        assert int(loads) >= least, case
        assert int(stores) >= 4, case
