"""Compile for Hopper, without a GPU, every kernel that a forward and backward pass of general rows launches on the
portable tier; as portable_launches.py, which this completes.
    python portable_rows_launches.py driver,size,dtype,cut ...      (cut: whether the sequence is, into segments)
"""

import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
from portable_launches import DTYPES, TIME, compile_launch
from triton.runtime.jit import JITFunction

import parallelflow as pf
from parallelflow.kernels import backend, launch, segments

HEADS = 2


def passes(driver, size, dtype):
    """A forward and a backward pass over arrays whose numbers nobody looks at."""

    def array(*shape, dtype=dtype):
        return torch.full((1, TIME, *shape), -0.01, dtype=dtype).requires_grad_()

    vectors = HEADS, size
    log_decay, beta = array(*vectors, dtype=torch.float32), array(HEADS, dtype=torch.float32)
    query, key, value = (array(*vectors) for _ in range(3))
    if driver == "kda":
        result = pf.kimi_delta_attention(query, key, value, beta, log_decay, backend="triton")
    elif driver == "gla":
        result = pf.gated_linear_attention(query, key, value, log_decay, backend="triton")
    elif driver == "rwkv7":
        read, write = array(*vectors), array(*vectors)
        result = pf.rwkv7(query, key, value, log_decay, read=read, write=write, backend="triton")
    else:
        rows = int(driver.removeprefix("product"))
        keys, values = array(rows, *vectors), array(rows, *vectors)
        result = pf.delta_product(query, keys, values, array(rows, HEADS, dtype=torch.float32), backend="triton")
    result.output.backward(torch.empty_like(result.output))


if __name__ == "__main__":
    JITFunction.run = compile_launch
    launch.Bound.__call__ = lambda self, programs, *arguments: self.kernel[(programs,)](*arguments, **self.constants)
    backend.elsewhere = lambda tier, inputs: None  # nothing runs: there need be no GPU
    for case in sys.argv[1:]:
        driver, size, dtype, cut = case.split(",")
        segments.SHORTEST, segments.FEWEST = (1, 1) if int(cut) else (TIME + 1, TIME)
        passes(driver, int(size), DTYPES[dtype])
