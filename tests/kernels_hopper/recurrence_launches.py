"""Compile for Hopper, without a GPU, the kernel for short sequences as the model functions launch it.

Run as a program, since Triton's interpreter, which other tests need, is chosen for a whole process.  Prints a line per
launch: the case, spilled bytes, and how many loads and stores of 16 bytes there are.  A way is "slots" (in place),
"accepted" (the same), "packed" (the same), "new" (new states from a store) or "fresh" (no states before).
    python recurrence_launches.py MODEL,K,V,T,STATE,WAY ...
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
from launches import compile_as_launched
from triton.backends.nvidia.compiler import get_ptxas

import parallelflow as pf
from parallelflow.kernels import launch
from parallelflow.testing import Sizes, make_inputs

case = ""


def compile_launch(self, programs, *arguments):
    """Take the place of a launch: compile, look, do not run."""
    kernel = self.kernel
    compiled = compile_as_launched(kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | self.constants)
    text = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(text)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report.stdout + report.stderr)))
    wide = [len(re.findall(rf"{kind}\.global\S*\.v4\.b32", text)) for kind in ("ld", "st")]
    print(case, spilled, *wide, sep=" | ", flush=True)


def step(model, key_dim, value_dim, time, stored, way):
    """A call of two sequences; the tensors are on no GPU, and nobody reads them."""
    sizes = Sizes(1 if way == "packed" else 2, time, 4, 8, key_dim, value_dim)
    inputs = {
        name: x.float() if name in ("beta", "log_decay") else x.bfloat16()
        for name, x in make_inputs(model, sizes).items()
    }
    store = torch.zeros(3, 8, key_dim, value_dim, dtype=stored)
    numbers = torch.arange(2, dtype=torch.int32)
    options = {"initial_state": store, "state_indices": numbers, "in_place": way != "new"}
    if way == "fresh":
        options = {}
    if way == "accepted":
        options["accepted_tokens"] = numbers
    if way == "packed":
        options["cu_seqlens"] = torch.tensor([0, 1, time], dtype=torch.int32)
    getattr(pf, model)(**inputs, backend="triton", validate=False, **options)


if __name__ == "__main__":
    sys.modules["parallelflow.integrate"].elsewhere = lambda tier, inputs: None  # as if the tensors were on a GPU
    launch.Bound.__call__ = compile_launch
    for case in sys.argv[1:]:
        model, *sizes, stored, way = case.split(",")
        step(model, *map(int, sizes), torch.bfloat16 if stored == "bf16" else torch.float32, way)
