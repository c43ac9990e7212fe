"""The Hopper forward scan, role by role on the CPU: its output, and the states and R that the backward pass makes."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import roles_on_cpu

from parallelflow.kernels.chunks import known_chunks, regular_chunks
from parallelflow.kernels.hopper import scan
from parallelflow.kernels.prepare import Prepared
from parallelflow.testing import relative_error

UNIT = 2.0**-9  # of bfloat16
ROUNDINGS = 4  # of the state, of what is solved for, of R and of the result
SCALE = 0.3


def by_definition(starts, q, k, v, prepared, initial, tied):
    """Outputs, entry states [M, HV, V, K] and R in float64, a chunk after another."""
    output, innovation, entries, number = torch.zeros_like(v), torch.zeros_like(v), [], 0
    heads = torch.arange(v.shape[1]) // (v.shape[1] // k.shape[1])
    for sequence, (begin, end) in enumerate(pairwise(starts)):
        state = initial[sequence]
        for first in range(begin, end, 64):
            rows, n = slice(first, min(first + 64, end)), min(end - first, 64)
            of = [None if x is None else x[number].double() for x in prepared]
            keys, queries, values = (x.transpose(0, 1) for x in (k[rows, heads], q[rows, heads], v[rows]))
            from_start, to_end = of[3][:, :n, None], of[4][:, :n, None]
            entries.append(state.mT)
            r = values
            if tied:
                r = of[0][:, :n, :n] @ (values - from_start * (keys @ state))
            output[rows] = (SCALE * from_start * (queries @ state) + of[1][:, :n, :n] @ r).transpose(0, 1)
            innovation[rows] = r.transpose(0, 1)
            state = of[3][:, 63, None, None] * state + (to_end * keys).mT @ r
            number += 1
    return output, torch.stack(entries), innovation


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("k", "v", "tied"), [(128, 64, True), (64, 128, True), (128, 64, False)])
def test_like_the_definition(k, v, tied, packed, monkeypatch):
    roles_on_cpu.take_over(monkeypatch, scan, ("rows", "blocks", "vectors"))
    generator = torch.Generator().manual_seed(5)
    starts, batch, time = ((0, 70, 70, 71, 400), 1, 400) if packed else ((0, 280, 560), 2, 280)
    chunks = known_chunks(starts, 64, torch.device("cpu")) if packed else regular_chunks(batch, time, 64)
    heads, value_heads, count = 1, 2, chunks.count

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    query, key = ((normal(batch, time, heads, k) * k**-0.5).bfloat16() for _ in range(2))
    value, initial = normal(batch, time, value_heads, v).bfloat16(), normal(len(starts) - 1, value_heads, k, v)
    inverse, scores = (0.05 * normal(2, count, value_heads, 64, 64)).tril().bfloat16()
    from_start, to_end = (torch.rand(count, value_heads, 64, generator=generator) for _ in range(2))
    prepared = Prepared((inverse + torch.eye(64)).bfloat16() if tied else None, scores, to_end, from_start, to_end,
                        from_start[..., 63].contiguous())  # fmt: skip

    output, states = torch.full_like(value, torch.nan), torch.full((count, value_heads, v, k), torch.nan).bfloat16()
    innovation = torch.full_like(value, torch.nan) if tied else None
    scan.SCANS.forward_scan(query, key, value, prepared, chunks, scale=SCALE, initial_state=initial, output=output,
                            final_state=None, ended=None, halts=None, halt=1)  # fmt: skip
    scan.SCANS.recompute_scan(key, value, prepared, chunks, initial_state=initial, entry_states=states,
                              innovation=innovation)  # fmt: skip
    flat = [x.flatten(0, 1).double() for x in (query, key, value)]
    expected = by_definition(starts, *flat, prepared, initial.double(), tied)
    for name, found, exact in zip(("output", "states", "R"), (output, states, innovation), expected, strict=True):
        if found is not None:
            error = relative_error(found.reshape(exact.shape), exact)
            assert error <= ROUNDINGS * UNIT, f"{name}: {error:.1e}"
