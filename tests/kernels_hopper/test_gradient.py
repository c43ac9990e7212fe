"""The gradient kernel compiles for Hopper within a multiprocessor's means; on a Hopper GPU it gives what the portable
kernels give."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from parallelflow.kernels import gradient as portable
from parallelflow.kernels.arena import Arena
from parallelflow.kernels.chunks import packed_chunks, regular_chunks
from parallelflow.kernels.hopper import gradient as hopper
from parallelflow.kernels.hopper.descriptors import _SWIZZLED, _SWIZZLED_ROWS
from parallelflow.kernels.prepare import prepare, vacant_arrays

SHARED_LIMIT = 232_448  # bytes that one block can have on compute capability 9.0
SERIALISED = {"C7510", "C7512", "C7514"}
SPILLED = 256  # bytes of addresses and counters, put aside once per chunk and key head
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def signature(key_size, dtype):
    keys = f"tensordesc<{dtype}[1,64,{key_size}],{_SWIZZLED_ROWS!r}>"
    values = f"tensordesc<{dtype}[1,64,64],{_SWIZZLED_ROWS!r}>"
    states = f"tensordesc<{dtype}[64,{key_size}],{_SWIZZLED!r}>"
    types = {"query": keys, "key": keys, "d_output": values, "d_value": values, "innovation": values}
    types |= {"entry_states": states, "exit_gradients": states, "d_query": keys, "d_key": keys}
    types |= dict.fromkeys(["beta", "cumulative", "d_beta", "d_log_decay"], "*fp32") | {
        "table": "*i32",
        "scale": "fp32",
    }
    return types | dict.fromkeys(
        ["items", "time", "length", "per_sequence", "key_heads", "heads", "steps", "parts"], "i32"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key_size", "parts", "dtype", "tied", "beta", "decay", "packed"),
    [(128, 2, "bf16", 1, 1, 1, 0), (128, 2, "bf16", 0, 0, 0, 1), (64, 1, "fp16", 1, 1, 0, 1)],
)
def test_gradient_compiles(compile_for_hopper, key_size, parts, dtype, tied, beta, decay, packed):
    constants = {"K": key_size, "PARTS": parts, "PACKED": packed, "TIED": tied, "HAS_BETA": beta, "HAS_DECAY": decay,
                 "DIVISIBLE": 2.0**-40}  # fmt: skip
    types = signature(key_size, dtype)
    resources = compile_for_hopper(hopper.gradient_kernel, types, constants, hopper.REGISTERS, warps=8)
    assert resources.shared_bytes <= SHARED_LIMIT
    assert resources.spilled_bytes <= SPILLED
    assert not SERIALISED & set(resources.remarks)
    assert not resources.unwritten


def test_nothing_fits_without_a_hopper_gpu():
    query = torch.zeros(1, 64, 1, 128, dtype=torch.bfloat16)
    assert not hopper.fits(query, query, regular_chunks(1, 64, 64))


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("has_decay", [True, False])
@pytest.mark.parametrize(
    ("heads", "value_heads", "k", "v"), [(2, 6, 128, 128), (1, 1, 64, 192), (3, 3, 128, 256), (3, 3, 128, 128)]
)
@pytest.mark.parametrize("ends", [None, [0, 70, 70, 300]])
def test_like_the_portable_kernels(heads, value_heads, k, v, has_decay, tied, ends):
    generator = torch.Generator("cuda").manual_seed(3)
    dtype, time = torch.bfloat16, 300

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    query, key = ((normal(1, time, heads, k) * k**-0.5).to(dtype) for _ in range(2))
    d_output, innovation, d_value = (normal(1, time, value_heads, v).to(dtype) for _ in range(3))
    beta = 2 * torch.rand(1, time, value_heads, device="cuda", generator=generator)
    beta[:, ::5] = 0.0
    log_decay = -normal(1, time, value_heads).exp() if has_decay else None
    table = None if ends is None else torch.tensor(ends, device="cuda")
    chunks = regular_chunks(1, time, 64) if ends is None else packed_chunks(table, time, 64)

    def memory():
        return Arena(torch.full((2**26,), 255, dtype=torch.uint8, device="cuda"))  # NaN, whatever the dtype

    prepared = vacant_arrays(memory(), dtype, value_heads, chunks, tied=tied)
    prepare(query, key, beta, log_decay, chunks, scale=0.3, into=prepared)
    states, gradients = (normal(chunks.count, value_heads, v, k).to(dtype) for _ in range(2))
    arrays = (query, key, beta, log_decay, d_output, innovation, d_value, states, gradients, prepared, chunks)
    assert hopper.fits(query, d_output, chunks)

    def found_by(module):
        into = portable.Gradients(*[x if x is None else torch.full_like(x, torch.nan)
                                    for x in (query, key, beta, log_decay)])  # fmt: skip
        sums = module.vacant_sums(memory(), query, d_output, chunks.count, 64)
        module.gradient(*arrays, scale=0.3, sums=sums, into=into)
        return into

    expected, got, again = (found_by(module) for module in (portable, hopper, hopper))
    if tied and hopper.may_overwrite(query, d_output):
        into = portable.Gradients(innovation.clone(), *map(torch.empty_like, (key, beta)),
                                  None if log_decay is None else torch.empty_like(log_decay))  # fmt: skip
        own = (*arrays[:5], into.query, *arrays[6:])
        hopper.gradient(*own, scale=0.3, sums=None, into=into)
        assert torch.equal(into.query, got.query)
        assert torch.equal(into.key, got.key)
    for name, a, b, c in zip(expected._fields, expected, got, again, strict=True):
        if a is not None:
            error = (a.double() - b.double()).norm() / a.double().norm()
            assert error <= torch.finfo(dtype).eps / 2, f"{name}: {error:.1e}"
            assert torch.equal(b, c), f"{name} differs between two runs"
