"""A new model is one short file: the example trains, and what it trains is the recurrence it states."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "new_model.py"


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_it_runs():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the example says nothing"
