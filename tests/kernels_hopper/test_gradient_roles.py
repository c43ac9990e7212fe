"""The Hopper gradient kernel, role by role on the CPU, against its definition in float64."""

import math
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import roles_on_cpu

from parallelflow.kernels.chunks import known_chunks, regular_chunks
from parallelflow.kernels.gradient import Gradients
from parallelflow.kernels.hopper import gradient
from parallelflow.kernels.prepare import Prepared
from parallelflow.testing import relative_error

UNIT = 2.0**-9  # of bfloat16
ROUNDINGS = 3  # of dA, of dB and of the result
SUMS = 300 * 2.0**-24  # float32 sums of up to 256 products and 64 tokens
SMALLEST = 2.0**-40  # beta by which is divided
SCALE = 0.3


@pytest.fixture
def on_the_cpu(monkeypatch):
    roles_on_cpu.take_over(monkeypatch, gradient, ("rows", "blocks"))
    monkeypatch.setattr(gradient, "multiprocessors", lambda device: 2)


def definition(q, k, beta, c, d_output, innovation, d_value, entry, exit, tied):
    """One chunk of one value head in float64: its parts of dQ and dK, d(beta), d(log-decay).  c in powers of two."""
    decay = torch.exp2(c[:, None] - c[None, :]).tril()
    from_start, to_end = torch.exp2(c), torch.exp2(c[-1] - c)
    d_read = d_output @ innovation.T * decay * SCALE
    d_own = -(d_value @ innovation.T * decay).tril(-1) * tied
    read, own, left = d_output @ entry, d_value @ entry * tied, innovation @ exit
    da, db = d_read * beta, d_own * beta
    dq = SCALE * from_start[:, None] * read + da @ k
    dk = (beta * to_end)[:, None] * left - from_start[:, None] * own + da.T @ q + (db + db.T) @ k
    slope = (d_read * (q @ k.T) + d_own * (k @ k.T)).sum(0) + to_end * (k * left).sum(1)
    if tied:  # a true W makes both forms equal; this one is taken where it can be
        divisible = beta > SMALLEST
        slope[divisible] = ((d_value * innovation).sum(1) / beta)[divisible]
    pairs = da * (q @ k.T) + db * (k @ k.T)
    exits = beta * to_end * (k * left).sum(1)
    d_sums = pairs.sum(1) - pairs.sum(0) - exits + from_start * (SCALE * q * read - k * own).sum(1)
    d_sums[-1] += exits.sum() + from_start[-1] * (entry * exit).sum()
    return dq, dk, slope, d_sums.flip(0).cumsum(0).flip(0)


def by_definition(starts, tensors, states, exits, tied):
    """The gradients of all chunks, and the decay sums [M, HV, 2, 64] that ``prepare`` gives the kernel."""
    query, key, beta, log_decay, *values = (tensor.flatten(0, 1).double() for tensor in tensors)
    found = [torch.zeros_like(tensor) for tensor in (query, key, beta, log_decay)]
    value_heads = beta.shape[1]
    cumulative = torch.zeros(*states.shape[:2], 2, 64)
    chunks = [slice(i, min(i + 64, end)) for begin, end in pairwise(starts) for i in range(begin, end, 64)]
    for number, rows in enumerate(chunks):
        for head in range(value_heads):
            of_key = head // (value_heads // query.shape[1])
            c = log_decay[rows, head].cumsum(0) / math.log(2)
            padded = torch.cat([c, c[-1:].expand(64 - len(c))])
            high = padded.float()
            cumulative[number, head] = torch.stack([high, (padded - high).float()])
            parts = definition(
                query[rows, of_key], key[rows, of_key], beta[rows, head], c, *(x[rows, head] for x in values),
                states[number, head].double(), exits[number, head].double(), tied)  # fmt: skip
            for whole, part, place in zip(found, parts, (of_key, of_key, head, head), strict=True):
                whole[rows, place] += part
    return found, cumulative


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("k", "v", "tied", "has_beta", "has_decay"),
    [(128, 128, 1, 1, 1), (64, 192, 1, 1, 1), (128, 256, 1, 1, 0), (64, 128, 0, 1, 1), (64, 64, 0, 0, 1),
     (128, 128, 0, 0, 0)],
)  # fmt: skip
def test_the_gradients_are_their_definition(on_the_cpu, k, v, tied, has_beta, has_decay, packed):
    generator = torch.Generator().manual_seed(7)
    starts, batch, time = ((0, 70, 70, 71, 200), 1, 200) if packed else ((0, 150, 300), 2, 150)
    chunks = known_chunks(starts, 64, torch.device("cpu")) if packed else regular_chunks(batch, time, 64)
    heads, value_heads = 2, 4

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    query, key = ((normal(batch, time, heads, k) * k**-0.5).bfloat16() for _ in range(2))
    values = [normal(batch, time, value_heads, v).bfloat16() for _ in range(3)]
    states, exits = ((0.2 * normal(chunks.count, value_heads, v, k)).bfloat16() for _ in range(2))
    beta, log_decay = torch.ones(batch, time, value_heads), torch.zeros(batch, time, value_heads)
    if has_beta:
        beta = 2 * torch.rand(beta.shape, generator=generator)
        beta[:, ::5] = 0.0
    if has_decay:
        log_decay = -normal(*beta.shape).exp()
        log_decay[:, 3::7], log_decay[:, 4::7], log_decay[:, 5::7] = -100.0, 0.0, -1e-6
    expected, cumulative = by_definition(starts, (query, key, beta, log_decay, *values), states, exits, tied)
    vacant = torch.full((1,), torch.nan)
    prepared = Prepared(vacant if tied else None, vacant, cumulative, vacant, vacant, vacant)
    given = query, key, beta if has_beta else None, log_decay if has_decay else None
    found = Gradients(*[None if tensor is None else torch.full_like(tensor, torch.nan) for tensor in given])
    gradient.gradient(*given, *values, states, exits, prepared, chunks, scale=SCALE, sums=None, into=found)
    for name, got, exact in zip(found._fields, found, expected, strict=True):
        if got is not None:
            error = relative_error(got.flatten(0, 1), exact)
            assert error <= (ROUNDINGS * UNIT if got.dtype == torch.bfloat16 else SUMS), f"{name}: {error:.1e}"
