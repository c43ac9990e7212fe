"""Compile Gluon kernels for compute capability 9.0 without a GPU: a process that answers lines of JSON.

It is a process of its own since Triton's interpreter, which other tests need, is chosen for a whole process, and leaves
nothing in it that could compile a reduction.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

from machine_code import disassemble, reads_of_unwritten
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource


def resources(folder, module, name, signature, constants, registers, warps):
    """Bytes of shared memory, bytes spilled, the numbers of ptxas's remarks, reads of registers nobody wrote."""
    kernel = getattr(importlib.import_module(module), name)
    signature = signature | dict.fromkeys(constants, "constexpr")
    pointers = [i for i, argument in enumerate(kernel.arg_names) if signature[argument].startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = GluonASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "maxnreg": registers}
    compiled = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(compiled.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True)
    text = report.stdout + report.stderr
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", text))
    return compiled.metadata.shared, spilled, re.findall(r"C75\d\d", text), reads_of_unwritten(disassemble(binary))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            print(json.dumps(resources(Path(folder), *json.loads(line))), flush=True)
