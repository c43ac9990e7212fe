"""The preparation on Hopper: its arithmetic on the CPU against float64, and its code as compiled for Hopper."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_on_cpu import run

from parallelflow.kernels.hopper.prepare import prepare_kernel

SHARED_LIMIT = 232_448
SCALE = 0.3


def draw(time, heads, group, size, decay, cosine):
    """q, k [1, T, H, K], beta, log_decay [1, T, HV] in float64; `cosine` correlates the keys and doubles beta."""
    generator = torch.Generator().manual_seed(time + size)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    key = unit(normal(1, time, heads, size))
    key = unit(cosine**0.5 * unit(normal(1, 1, heads, size)) + (1 - cosine) ** 0.5 * key)
    beta = normal(1, time, heads * group).sigmoid() * (2 if cosine else 1)
    uniform = torch.rand(1, time, heads * group, generator=generator, dtype=torch.float64)
    steps = {
        None: torch.zeros_like(uniform),
        "mild": -0.2 * normal(1, time, heads * group).exp(),
        "strong": torch.where(uniform < 0.3, -100.0, torch.where(uniform < 0.6, -1e-6, 0.0)),
        "resets": torch.where(uniform < 0.1, float("-inf"), -0.1 * uniform),
    }[decay]
    return unit(normal(1, time, heads, size)), key, beta, steps


def by_definition(query, key, beta, log_decay):
    """The arrays of `prepare` in float64, [chunk, value head, ...], from sums of each stretch of decays on its own."""
    time, group = query.shape[1], beta.shape[2] // query.shape[2]
    count = -(-time // 64)

    def chunks(x):
        padded = torch.zeros(count * 64, *x.shape[2:], dtype=torch.float64)
        padded[:time] = x[0].double()
        return padded.view(count, 64, *x.shape[2:]).transpose(1, 2)

    q, k = (chunks(x).repeat_interleave(group, 1) for x in (query, key))
    beta, steps = chunks(beta), chunks(log_decay).clamp(min=-800)
    token = torch.arange(64)
    after = (token[None, :, None] > token[None, None, :]) & (token[None, :, None] <= token[:, None, None])  # s < r <= t
    stretch = torch.einsum("trs,mhr->mhts", after.double(), steps)
    decay = stretch.exp() * beta[..., None, :]
    lower = (k @ k.mT * decay).tril(-1)
    eye = torch.eye(64, dtype=torch.float64)
    sums = torch.einsum("tr,mhr->mht", (token[:, None] >= token).double(), steps)
    return {
        "inverse": torch.linalg.solve_triangular(eye + lower, eye.expand_as(lower), upper=False),
        "scores": SCALE * (q @ k.mT * decay).tril(),
        "cumulative": sums / torch.tensor(2.0, dtype=torch.float64).log(),
        "from_start": sums.exp(),
        "to_end": stretch[..., -1, :].exp() * beta,
        "total": sums[..., -1].exp(),
    }


def kernel_arrays(query, key, beta, log_decay, *, tied=True, table=None):
    """What the kernel writes, from memory that held NaN."""
    time, heads, size = query.shape[1:]
    value_heads = beta.shape[2]
    count = -(-time // 64) if table is None else len(table)
    arrays = {
        "inverse": torch.full((count, value_heads, 64, 64), torch.nan, dtype=query.dtype) if tied else None,
        "scores": torch.full((count, value_heads, 64, 64), torch.nan, dtype=query.dtype),
        "cumulative": torch.full((count, value_heads, 2, 64), torch.nan),
        "from_start": torch.full((count, value_heads, 64), torch.nan),
        "to_end": torch.full((count, value_heads, 64), torch.nan),
        "total": torch.full((count, value_heads), torch.nan),
    }
    run(prepare_kernel, count * heads, {
        "query": query, "key": key, "beta": beta, "log_decay": log_decay, **arrays, "table": table, "time": time,
        "per_sequence": count, "scale": SCALE, "H": heads, "HV": value_heads, "K": size,
        "WIDTH": max(16, 1 << (size - 1).bit_length()), "HEADS": 1 if heads == value_heads else 2,
        "PACKED": table is not None, "TIED": tied, "HAS_BETA": True, "HAS_DECAY": log_decay is not None,
    })  # fmt: skip
    return arrays


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("time", "heads", "group", "size", "decay", "cosine", "dtype"),
    [
        (100, 2, 1, 32, "mild", 0.0, torch.bfloat16),
        (70, 1, 2, 24, "strong", 0.0, torch.bfloat16),
        (64, 1, 3, 16, "resets", 0.0, torch.float16),
        (64, 1, 4, 32, None, 0.999, torch.bfloat16),
        (64, 1, 1, 32, "mild", 0.999, torch.bfloat16),
    ],
)
def test_arrays_against_their_definitions(time, heads, group, size, decay, cosine, dtype):
    query, key, beta, steps = draw(time, heads, group, size, decay, cosine)
    query, key, beta, steps = query.to(dtype), key.to(dtype), beta.float(), steps.float()
    expected = by_definition(query, key, beta, steps)
    found = kernel_arrays(query, key, beta, None if decay is None else steps)
    for name in ("inverse", "scores"):  # three bfloat16 passes leave nothing beside the rounding of the result
        assert error(found[name], expected[name]) <= 1.05 * error(expected[name].to(dtype), expected[name])
        assert not found[name].triu(1).any()
    sums = found["cumulative"].double().sum(2)  # two float32 numbers
    assert torch.allclose(sums, expected["cumulative"], rtol=1e-13, atol=1e-12)
    # Of a sum in float32 the exponential has |sum| roundings: 2^-24 · log 2 · 126 at most before it is 0 in float32.
    for name in ("from_start", "to_end", "total"):
        assert torch.allclose(found[name].double(), expected[name], rtol=1e-5, atol=2.0**-126)


def test_rows_that_only_write():
    query, key, beta, steps = draw(64, 1, 2, 16, "mild", 0.0)
    query, key, beta, steps = query.to(torch.float16), key.to(torch.float16), beta.float(), steps.float()
    expected = by_definition(query, key, beta, steps)["scores"]
    found = kernel_arrays(query, key, beta, steps, tied=False)
    assert error(found["scores"], expected) <= 1.05 * error(expected.half(), expected)


def test_packed_sequences_and_spare_chunks():
    query, key, beta, steps = draw(90, 1, 2, 16, "mild", 0.0)
    query, key, beta, steps = query.half(), key.half(), beta.float(), steps.float()
    table = torch.tensor([[0, 20], [20, 64], [84, 6], [90, 0]], dtype=torch.int32)
    found = kernel_arrays(query, key, beta, steps, table=table)
    for chunk, (first, length) in enumerate(table[:3].tolist()):
        part = slice(first, first + length)
        expected = by_definition(query[:, part], key[:, part], beta[:, part], steps[:, part])
        for name in ("inverse", "scores"):
            assert error(found[name][chunk], expected[name][0]) <= 1.05 * error(expected[name].half(), expected[name])
    spare = {name: array[3] for name, array in found.items()}
    assert torch.equal(spare["inverse"], torch.eye(64).half().expand(2, 64, 64))
    assert not spare["scores"].any()
    assert not spare["to_end"].any()


def test_a_sequence_of_nan_stays_alone():
    query, key, beta, steps = draw(128, 1, 2, 16, "mild", 0.0)
    key[:, 64:] = torch.nan
    found = kernel_arrays(query.half(), key.half(), beta.float(), steps.float())
    for name in ("inverse", "scores"):
        assert found[name][0].isfinite().all()
        assert not found[name][1].isfinite().all()


@pytest.mark.parametrize(
    ("group", "size", "dtype", "tied", "packed", "decay"),
    [(1, 128, "bf16", 1, 0, 1), (2, 128, "bf16", 1, 0, 1), (4, 128, "bf16", 1, 1, 1), (1, 64, "fp16", 0, 0, 0)],
)
def test_compiles(compile_for_hopper, group, size, dtype, tied, packed, decay):
    heads = 1 if group == 1 else 2
    constants = {
        "H": 16, "HV": 16 * group, "K": size, "WIDTH": size, "HEADS": heads, "PACKED": packed, "TIED": tied,
        "HAS_BETA": 1, "HAS_DECAY": decay,
    }  # fmt: skip
    vectors = ("beta", "log_decay", "cumulative", "from_start", "to_end", "total")
    types = dict.fromkeys(("query", "key", "inverse", "scores"), f"*{dtype}") | dict.fromkeys(vectors, "*fp32")
    types |= {"table": "*i32", "time": "i32", "per_sequence": "i32", "scale": "fp32"}
    resources = compile_for_hopper(prepare_kernel, types, constants, 200 if heads == 2 else None, warps=heads)
    # five programs of two warps, or eight of one, to a multiprocessor (1 KB of each is the system's)
    assert resources.shared_bytes <= SHARED_LIMIT // (5 if heads == 2 else 8) - 1024
    assert resources.spilled_bytes == 0
    assert not resources.unwritten
