"""A kernel compiled for Hopper, without a GPU, as a launch with these arguments would have it compiled."""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def compile_as_launched(kernel, bound):
    """What Triton compiles for ``bound``, the kernel's arguments and the launch's options by name."""
    options = {name: bound[name] for name in OPTIONS if name in bound}
    types, constants, divisible = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value, general = bound[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not general):
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = f"*{NAMES[value.dtype]}"
            divisible[(place,)] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and not general and value % 16 == 0:
                divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
