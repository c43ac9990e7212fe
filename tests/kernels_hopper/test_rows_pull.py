"""The gradients of rows on Hopper: the kernel on the CPU against float64, and its code as compiled."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import pull_by_definition
import roles_on_cpu
from test_rows_scan import type_of

from parallelflow.kernels.chunks import known_chunks, regular_chunks
from parallelflow.kernels.hopper import rows_pull
from parallelflow.kernels.rows import pull
from parallelflow.kernels.rows.layout import MIDDLE, NO_DECAY, SCALAR_DECAY, VECTOR_DECAY, WHOLE, Layout
from parallelflow.kernels.rows.pairs import Pairs
from parallelflow.testing import relative_error

UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
ROUNDINGS = 4  # of pairs, of both sides' operands and of the result
# name: reading and lone rows, tokens a chunk, K, V, decay, raw, sequential, read coefficients, tied
KINDS = {
    "kda": (1, 0, 64, 128, 128, VECTOR_DECAY, False, False, True, True),
    "kda-64": (1, 0, 64, 64, 64, VECTOR_DECAY, False, False, True, True),
    "untied": (1, 0, 64, 64, 128, VECTOR_DECAY, False, False, True, False),
    "gla": (0, 1, 64, 128, 64, VECTOR_DECAY, False, False, False, False),
    "rwkv7": (1, 1, 64, 64, 64, VECTOR_DECAY, True, False, False, False),
    "comba": (1, 0, 64, 128, 64, SCALAR_DECAY, True, False, True, False),
    "scalar": (1, 1, 64, 64, 64, SCALAR_DECAY, False, False, True, True),
    "gated-product-3": (3, 0, 16, 64, 64, SCALAR_DECAY, False, True, True, True),
    "gated-simultaneous-2": (2, 1, 32, 64, 128, SCALAR_DECAY, True, False, True, False),
    "product-2": (2, 0, 32, 128, 64, NO_DECAY, False, True, True, True),
    "product-3": (3, 0, 16, 64, 64, NO_DECAY, False, True, True, True),
    "simultaneous-4": (4, 0, 16, 64, 64, NO_DECAY, False, False, False, False),
    "mixed": (1, 4, 16, 64, 64, NO_DECAY, False, False, True, False),
}


def layout_of(kind, heads):
    r, lone, c, k, v, decay, raw, sequential, coefficients, tied = KINDS[kind]
    layout = Layout(C=c, R=r, L=lone, heads=heads, value_heads=2, K=k, V=v, decay=decay, raw=raw,
                    sequential=sequential)  # fmt: skip
    return layout, coefficients, tied


def pulled(layout, chunks, arrays, floors, scale):
    total = None
    return pull.pull(
        arrays.query, arrays.read, arrays.write, arrays.lone, arrays.log_decay, arrays.solution, arrays.given,
        arrays.d_source, arrays.d_output, arrays.entries, arrays.exits, total, floors, Pairs(None, None, None, None),
        layout, chunks, scale, rows_pull.HOPPER)  # fmt: skip


def where(layout, packed):
    """Sequences and chunks: two alike, or packed ones of two chunks, none, one token, one chunk and some."""
    c = layout.C
    if packed:
        starts = (0, c + 6, c + 6, c + 7, 2 * c + 16)
        return 1, starts[-1], known_chunks(starts, c, torch.device("cpu"))
    return 2, c + 11, regular_chunks(2, c + 11, c)


@pytest.fixture
def on_the_cpu(monkeypatch):
    known = {}

    def noting(make):
        def made(tensor, *sizes):
            found = make(tensor, *sizes)
            known[id(found)] = roles_on_cpu.Descriptor(found, tensor)
            return found

        return made

    def bound(kernel, **constants):
        def launch(programs, *arguments):
            arguments = [known.get(id(argument), argument) for argument in arguments]
            named = dict(zip(kernel.arg_names, arguments, strict=False))
            options = {name: value for name, value in constants.items() if name in kernel.arg_names}
            roles_on_cpu.run(kernel, programs, named | options)

        return launch

    for name in ("rows", "places", "blocks"):
        monkeypatch.setattr(rows_pull, name, noting(getattr(rows_pull, name)))
    monkeypatch.setattr(rows_pull, "bind", bound)
    monkeypatch.setattr(pull, "bind", lambda kernel, **constants: lambda *arguments: None)  # strong decays


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_their_definition(on_the_cpu, kind, packed):
    dtype = torch.float16 if packed else torch.bfloat16
    own = 1 if packed else 2  # two value heads that share the others: gradients in float32, to be summed
    layout, coefficients, tied = layout_of(kind, own)
    batch, time, chunks = where(layout, packed)
    arrays = pull_by_definition.draw(layout, chunks, batch, time, dtype, coefficients, tied, own)
    floors = None
    if layout.decay == VECTOR_DECAY:
        floors = torch.full((chunks.count * layout.value_heads,), WHOLE, dtype=torch.int32)
    assert rows_pull.serves(layout, chunks, arrays.read)
    scale = layout.K**-0.5
    found = pulled(layout, chunks, arrays, floors, scale)
    exact = pull_by_definition.pull(layout, chunks, arrays, scale, layout.raw, layout.sequential)
    for name, expected in exact.items():
        got = getattr(found, name).double().flatten()
        assert got.isfinite().all(), name
        error = relative_error(got, expected.flatten())
        assert error <= ROUNDINGS * UNIT[dtype], f"{name}: {error:.1e}"
