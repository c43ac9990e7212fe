"""The examples of this part run, in processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from parallelflow.compat import fla

EXAMPLES = Path(__file__).parents[2] / "examples"


DOCUMENT = EXAMPLES.parent / "docs" / "coming_from_fla.md"


def test_the_document():
    """Its code for FLA runs, its links lead somewhere, and it names every function and family."""
    text = DOCUMENT.read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    before = {name for name in sys.modules if name.partition(".")[0] == "fla"}
    try:
        exec(block, {})
        assert "fla.ops.gated_delta_rule" in sys.modules
    finally:
        fla.uninstall()
    assert {name for name in sys.modules if name.partition(".")[0] == "fla"} == before
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DOCUMENT.parent / target).exists(), target
    for family in fla.FAMILIES:
        assert f"| `{family.partition('.')[0]}` |" in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("drop_in_for_fla.py", "use_qk_l2norm: unknown keyword of chunk_gated_delta_rule"),
        ("accelerate_qwen.py", "text: the same 16 tokens"),
    ],
)
def test_example(name, said):
    if name == "accelerate_qwen.py":
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
