"""Compile Gluon kernels for compute capability 9.0 without a GPU, and read what ptxas says of them."""

import re
import subprocess
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
    from machine_code import disassemble, reads_of_unwritten
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import compile as compile_kernel
    from triton.experimental.gluon._runtime import GluonASTSource

    folder = tmp_path_factory.mktemp("hopper")

    def build(kernel, signature, constants, registers, warps=4):
        signature = signature | dict.fromkeys(constants, "constexpr")
        pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
        aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
        source = GluonASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": warps, "maxnreg": registers}
        compiled = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx = folder / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(folder / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
        text = report.stdout + report.stderr
        spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", text))
        unwritten = reads_of_unwritten(disassemble(folder / "kernel.cubin"))
        return Resources(compiled.metadata.shared, spilled, re.findall(r"C75\d\d", text), unwritten)

    return build
