"""The scans compile for Hopper, fit a multiprocessor, spill nothing, and ptxas serialises none of their products."""

import pytest

pytest.importorskip("triton.experimental.gluon")

from parallelflow.kernels.hopper.descriptors import _FLAT, _SWIZZLED, _SWIZZLED_ROWS
from parallelflow.kernels.hopper.forward import forward_kernel
from parallelflow.kernels.hopper.reverse import reverse_kernel
from parallelflow.kernels.hopper.scan import FLOW_REGISTERS

SHARED_LIMIT = 232_448  # bytes that one block can have on compute capability 9.0
SERIALISED = {"C7510", "C7512", "C7514"}


def descriptor(block, layout, dtype):
    return f"tensordesc<{dtype}[{','.join(map(str, block))}],{layout!r}>"


def signature(arrays, pointers, key_size, dtype):
    """Types of the arguments: `arrays` maps a name to the kind of its descriptor."""
    kinds = {
        "key": descriptor([1, 64, key_size], _SWIZZLED_ROWS, dtype),
        "value": descriptor([1, 64, 64], _SWIZZLED_ROWS, dtype),
        "square": descriptor([64, 64], _SWIZZLED, dtype),
        "state": descriptor([64, key_size], _SWIZZLED, dtype),
        "vector": descriptor([64], _FLAT, "fp32"),
    }
    types = {name: kinds[kind] for name, kind in arrays.items()}
    types |= dict.fromkeys(pointers, "*fp32")
    types |= {"cu_seqlens": "*i32", "offsets": "*i32", "flows": "*i32", "scale": "fp32"}
    return types | dict.fromkeys(["tokens", "length", "per_sequence", "key_heads", "heads", "value_dim"], "i32")


FORWARD = {
    "query": "key", "key": "key", "value": "value", "inverse": "square", "scores": "square", "from_start": "vector",
    "to_end": "vector", "output": "value", "solution": "value", "entry": "state",
}  # fmt: skip
REVERSE = {
    "query": "key", "key": "key", "gradient": "value", "inverse": "square", "scores": "square", "from_start": "vector",
    "to_end": "vector", "exit": "state", "solution": "value",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key_size", "dtype", "tied", "output", "packed", "halt"),
    [
        (128, "bf16", 1, 1, 0, 0),
        (128, "bf16", 1, 1, 0, 1),
        (128, "bf16", 1, 1, 1, 0),
        (128, "bf16", 1, 0, 1, 0),
        (128, "bf16", 1, 0, 0, 1),
        (128, "bf16", 0, 1, 1, 0),
        (128, "bf16", 0, 1, 0, 1),
        (128, "bf16", 0, 0, 0, 0),
        (64, "fp16", 1, 1, 1, 0),
        (64, "fp16", 1, 1, 0, 1),
    ],
)
def test_forward_compiles(compile_for_hopper, key_size, dtype, tied, output, packed, halt):
    constants = {
        "K": key_size, "STAGES": 3, "SOLVE": tied, "OUTPUT": output, "SAVE": int(not output and not halt),
        "INITIAL": packed or halt, "FINAL": output, "FLOW": 0, "HALT": halt, "OWNED": packed, "PACKED": packed,
    }  # fmt: skip
    types = signature(FORWARD, ["initial_state", "final_state", "halts"], key_size, dtype) | {"halt": "i32"}
    resources = compile_for_hopper(forward_kernel, types, constants, 168 if output else 240)
    assert resources.shared_bytes <= SHARED_LIMIT
    assert resources.spilled_bytes == 0
    assert not resources.unwritten
    assert not SERIALISED & set(resources.remarks)


@pytest.mark.parametrize(
    ("key_size", "dtype", "tied", "packed"),
    [(128, "bf16", 1, 1), (128, "bf16", 0, 0), (64, "fp16", 1, 0)],
)
def test_reverse_compiles(compile_for_hopper, key_size, dtype, tied, packed):
    constants = {"K": key_size, "STAGES": 3, "SOLVE": tied, "FINAL": 1, "INITIAL": 1, "FLOW": 0,
                 "OWNED": packed, "PACKED": packed}  # fmt: skip
    types = signature(REVERSE, ["final_gradient", "initial_gradient"], key_size, dtype)
    resources = compile_for_hopper(reverse_kernel, types, constants, 168)
    assert resources.shared_bytes <= SHARED_LIMIT
    assert resources.spilled_bytes == 0
    assert not resources.unwritten
    assert not SERIALISED & set(resources.remarks)


@pytest.mark.parametrize(
    ("key_size", "dtype", "tied", "initial", "packed"),
    [(128, "bf16", 1, 1, 1), (128, "bf16", 1, 0, 1), (128, "bf16", 0, 1, 1), (64, "fp16", 1, 0, 1),
     (128, "bf16", 1, 0, 0), (128, "bf16", 0, 0, 0)],
)  # fmt: skip
def test_flows_compile(compile_for_hopper, key_size, dtype, tied, initial, packed):
    constants = {
        "K": key_size, "STAGES": 3, "SOLVE": tied, "OUTPUT": 0, "SAVE": 0, "INITIAL": initial, "FINAL": 1, "FLOW": 1,
        "HALT": 0, "OWNED": 0, "PACKED": packed,
    }  # fmt: skip
    types = signature(FORWARD, ["initial_state", "final_state", "halts"], key_size, dtype) | {"halt": "i32"}
    resources = compile_for_hopper(forward_kernel, types, constants, FLOW_REGISTERS)
    assert resources.shared_bytes <= SHARED_LIMIT // 2 - 1024  # two on a multiprocessor, 1 KB of each is the system's
    assert resources.spilled_bytes == 0
    assert not resources.unwritten
    assert not SERIALISED & set(resources.remarks)


@pytest.mark.parametrize(
    ("key_size", "dtype", "tied", "final", "packed"),
    [(128, "bf16", 1, 1, 1), (64, "fp16", 0, 0, 1), (128, "bf16", 1, 0, 1), (128, "bf16", 1, 0, 0)],
)
def test_reverse_flows_compile(compile_for_hopper, key_size, dtype, tied, final, packed):
    constants = {"K": key_size, "STAGES": 3, "SOLVE": tied, "FINAL": final, "INITIAL": 1, "FLOW": 1, "OWNED": 0,
                 "PACKED": packed}  # fmt: skip
    types = signature(REVERSE, ["final_gradient", "initial_gradient"], key_size, dtype)
    resources = compile_for_hopper(reverse_kernel, types, constants, 168)
    assert resources.shared_bytes <= SHARED_LIMIT
    assert resources.spilled_bytes == 0
    assert not resources.unwritten
    assert not SERIALISED & set(resources.remarks)
