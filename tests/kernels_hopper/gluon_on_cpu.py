"""The arithmetic of a Gluon kernel on the CPU: its tensors are torch tensors, layouts and barriers mean nothing.

It sees formulas, indices, masks, reads outside an array and memory that nobody wrote (NaN); it does not see layouts,
barriers or the compiler.
"""

import types
from pathlib import Path

import torch

OPERATORS = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "floordiv": torch.floor_divide, "mod": torch.remainder,
    "truediv": torch.true_divide, "or": torch.logical_or, "ge": torch.ge, "gt": torch.gt, "le": torch.le,
    "lt": torch.lt, "eq": torch.eq,
}  # fmt: skip


def raw(x):
    return x.data if isinstance(x, Value) else getattr(x, "value", x)  # a constexpr's


class Value:
    """A tensor or number inside the kernel."""

    def __init__(self, data):
        self.data = torch.as_tensor(data)

    shape = property(lambda self: tuple(self.data.shape))
    dtype = property(lambda self: self.data.dtype)
    type = types.SimpleNamespace(layout=None)

    def to(self, dtype, bitcast=False):
        return Value(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def __getitem__(self, key):
        return Value(self.data[key])

    def __and__(self, other):
        return Value(self.data & raw(other))

    def __neg__(self):
        return Value(-self.data)

    def __bool__(self):
        return bool(self.data)

    def __index__(self):
        return int(self.data)

    def __radd__(self, other):
        return Value(other + self.data)

    def __rmul__(self, other):
        return Value(other * self.data)

    def __rsub__(self, other):
        return Value(other - self.data)

    def __rfloordiv__(self, other):
        return Value(torch.floor_divide(torch.as_tensor(other), self.data))

    def __rmod__(self, other):
        return Value(torch.remainder(torch.as_tensor(other), self.data))


def _operator(function):
    return lambda self, other: Value(function(self.data, raw(other)))


for _name, _function in OPERATORS.items():
    setattr(Value, f"__{_name}__", _operator(_function))


class Pointer:
    """An address in an array of global memory, or None."""

    def __init__(self, array, offset=0):
        self.array, self.offset = array, offset
        self.dtype = types.SimpleNamespace(element_ty=None if array is None else array.dtype)

    def __add__(self, other):
        return Pointer(self.array, self.offset + raw(other))

    def places(self, mask):
        """Flat array, offsets and which of them count; those must lie inside."""
        flat, offset = self.array.view(-1), torch.as_tensor(self.offset)
        keep = torch.ones_like(offset, dtype=torch.bool) if mask is None else raw(mask).broadcast_to(offset.shape)
        assert not ((offset < 0) | (offset >= flat.numel()))[keep].any(), "an address outside the array"
        return flat, offset, keep


class Shared:
    """A view of shared memory."""

    def __init__(self, data):
        self.data = data

    shape = property(lambda self: tuple(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def load(self, layout):
        return Value(self.data.clone())

    def store(self, value):
        assert value.shape == self.shape
        assert value.dtype == self.data.dtype
        self.data.copy_(value.data)

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def index(self, i):
        return Shared(self.data[i])

    def permute(self, order):
        return Shared(self.data.permute(order))

    def reshape(self, shape):
        return Shared(self.data.view(shape))

    def _reinterpret(self, dtype, shape, layout):
        return Shared(self.data.view(dtype).view(shape))


def load(pointer, mask=None, other=0.0):
    flat, offset, keep = pointer.places(mask)
    found = flat[offset.clamp(0, flat.numel() - 1)]
    return Value(torch.where(keep, found, torch.as_tensor(other, dtype=found.dtype)))


def store(pointer, value, mask=None):
    flat, offset, keep = pointer.places(mask)
    flat[offset[keep]] = torch.as_tensor(raw(value)).broadcast_to(offset.shape)[keep].to(flat.dtype)


def where(condition, x, y):
    dtype = next((value.dtype for value in (x, y) if isinstance(value, Value)), torch.float32)
    return Value(torch.where(condition.data, torch.as_tensor(raw(x)), torch.as_tensor(raw(y))).to(dtype))


def assembly(text, constraints, args, dtype, is_pure, pack):
    if text.startswith("mov.b32"):
        return args[0]
    if text.startswith("fma.rn.f32"):
        return args[0] * args[1] + args[2]
    if text.startswith("{ shl.b32 $0, $2, 16;"):
        return args[0].to(dtype)
    assert text.startswith("ex2.approx.ftz")
    power = torch.exp2(args[0].data)
    return Value(torch.where(power < 2.0**-126, 0.0, power).to(dtype))


def multiply(a, b, acc):
    return Value(acc.data + a.data.float() @ b.data.float())


class Layout:
    def __init__(self, *args, **options):
        pass

    @classmethod
    def with_identity_for(cls, *args):
        return cls()


LAYOUTS = (
    "SliceLayout", "BlockedLayout", "NVMMADistributedLayout", "DistributedLinearLayout", "DotOperandLayout",
    "SwizzledSharedLayout", "PaddedSharedLayout", "NVMMASharedLayout",
)  # fmt: skip


def scan(x, axis, combine, reverse=False):
    return Value(x.data.flip(axis).cumsum(axis).flip(axis) if reverse else x.data.cumsum(axis))


def language(program, programs=1):
    """What stands for `triton.experimental.gluon.language` in one of some programs."""
    dtypes = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64")}
    return types.SimpleNamespace(
        **dtypes, **dict.fromkeys(LAYOUTS, Layout), constexpr=None, static_range=range,
        static_assert=lambda *args: None, thread_barrier=lambda: None,
        program_id=lambda axis: Value(torch.tensor(program, dtype=torch.int32)),
        num_programs=lambda axis: programs,
        arange=lambda start, end, layout: Value(torch.arange(start, end, dtype=torch.int32)),
        zeros=lambda shape, dtype, layout: Value(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, value, dtype, layout: Value(torch.full(shape, value, dtype=dtype)),
        minimum=lambda x, y: Value(torch.minimum(torch.as_tensor(raw(x)), torch.as_tensor(raw(y)))),
        exp2=lambda x: Value(torch.exp2(x.data)),
        maximum=lambda x, y: Value(torch.fmax(torch.as_tensor(raw(x)), torch.as_tensor(raw(y)))),
        max=lambda x, axis: Value(x.data.amax(axis)), num_warps=lambda: 1,
        zeros_like=lambda x: Value(torch.zeros_like(x.data)),
        where=where, load=load, store=store, inline_asm_elementwise=assembly,
        abs=lambda x: Value(x.data.abs()), associative_scan=scan,
        sum=lambda x, axis: Value(x.data.sum(axis)),
        reshape=lambda x, shape: Value(x.data.reshape(shape)),
        permute=lambda x, order: Value(x.data.permute(order)),
        join=lambda x, y: Value(torch.stack((x.data, y.data), -1)),
        split=lambda x: (Value(x.data[..., 0]), Value(x.data[..., 1])),
        expand_dims=lambda x, axis: Value(x.data.unsqueeze(axis)),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.full(shape, torch.nan, dtype=dtype)),
    )  # fmt: skip


ASYNC_COPY = types.SimpleNamespace(
    commit_group=lambda: None, wait_group=lambda outstanding: None,
    async_copy_global_to_shared=lambda target, pointer, mask: target.store(load(pointer, mask)),
)  # fmt: skip


def plain_functions(kernel):
    """What a kernel's functions call by name, those of its folder as plain functions of that same scope."""
    folder = Path(kernel.fn.__code__.co_filename).parent
    scope: dict = {}

    def gather(names):
        for name, thing in names.items():
            function = getattr(thing, "fn", thing)
            if isinstance(function, types.FunctionType) and Path(function.__code__.co_filename).parent == folder:
                if name not in scope:
                    scope[name] = types.FunctionType(function.__code__, scope, name, function.__defaults__)
                    gather(function.__globals__)
            else:
                scope.setdefault(name, thing)

    gather(kernel.fn.__globals__)
    return scope


def inside(kernel, arguments):
    """A kernel's arguments by name, as it sees them; tensors are global memory."""
    return {
        name: Pointer(value) if value is None or isinstance(value, torch.Tensor)
        else Value(torch.tensor(value, dtype=torch.int32)) if name in kernel.do_not_specialize
        else value
        for name, value in arguments.items()
    }  # fmt: skip


def run(kernel, programs, arguments):
    """Run the programs 0 .. programs - 1 of a kernel."""
    scope, held = plain_functions(kernel), inside(kernel, arguments)
    scope |= {"mma_v2": multiply, "async_copy": ASYNC_COPY}
    for program in range(programs):
        scope["gl"] = language(program)
        types.FunctionType(kernel.fn.__code__, scope)(**held)
