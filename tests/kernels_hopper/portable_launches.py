"""Compile for Hopper, without a GPU, every kernel that a forward and backward pass of the portable tier launches.

Run as a program, since Triton's interpreter, which other tests need, is chosen for a whole process.  Prints a line per
kernel: its name, and the instructions that read a register which nothing has written, or a wrong one.
    python portable_launches.py K,V,H,HV,tied,dtype,cut ...      (cut: whether the sequence is, into segments)
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
from launches import compile_as_launched
from machine_code import crossed_descriptors, disassemble, reads_of_unwritten
from triton.runtime.jit import JITFunction

from parallelflow.kernels import delta, launch, segments

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TIME = 130


def compile_launch(kernel, *arguments, grid=None, warmup=False, **named):
    """Take the place of a launch: compile, look, do not run."""
    compiled = compile_as_launched(kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | named)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        code = disassemble(Path(binary.name))
        print(kernel.__name__, *reads_of_unwritten(code), *crossed_descriptors(code), sep=" | ", flush=True)


def passes(key_dim, value_dim, heads, value_heads, tied, dtype):
    """A forward and a backward pass over arrays that nobody fills."""
    query, key = torch.empty(2, 1, TIME, heads, key_dim, dtype=dtype)
    value, per_head = torch.empty(1, TIME, value_heads, value_dim, dtype=dtype), torch.empty(1, TIME, value_heads)
    options = {"tied": tied, "scale": 0.3}
    output, state, saved = delta.forward(
        query, key, value, per_head, per_head, need_final_state=True, save_for_backward=True, **options)  # fmt: skip
    delta.backward(query, key, value, per_head, per_head, saved, output, state, **options)


if __name__ == "__main__":
    JITFunction.run = compile_launch
    launch.Bound.__call__ = lambda self, programs, *arguments: self.kernel[(programs,)](*arguments, **self.constants)
    for case in sys.argv[1:]:
        *sizes, tied, dtype, cut = case.split(",")
        segments.SHORTEST, segments.FEWEST = (1, 1) if int(cut) else (TIME + 1, TIME)
        passes(*map(int, sizes), bool(int(tied)), DTYPES[dtype])
