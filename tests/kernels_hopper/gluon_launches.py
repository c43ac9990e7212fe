"""Compile a Gluon kernel for compute capability 9.0 without a GPU, and read what ptxas says of it."""

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from machine_code import disassemble, reads_of_unwritten


class Resources(NamedTuple):
    """What one compiled kernel asks of a multiprocessor, the numbers of ptxas's remarks, and the instructions that read
    a uniform register which nothing has written."""

    shared_bytes: int
    spilled_bytes: int
    remarks: list[str]
    unwritten: list[str]


def compile_gluon(module, name, signature, constants, registers, warps):
    """The kernel ``module.name``.  Not in a process that has chosen Triton's interpreter: the language's own functions
    are then none that can be compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import compile as compile_kernel
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = getattr(importlib.import_module(module), name)
    signature = signature | dict.fromkeys(constants, "constexpr")
    pointers = [i for i, argument in enumerate(kernel.arg_names) if signature[argument].startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = GluonASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "maxnreg": registers}
    compiled = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(binary)]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
        unwritten = reads_of_unwritten(disassemble(binary))
    text = report.stdout + report.stderr
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", text))
    return Resources(compiled.metadata.shared, spilled, re.findall(r"C75\d\d", text), unwritten)
