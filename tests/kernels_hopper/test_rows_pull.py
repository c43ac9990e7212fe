"""The gradients of rows on Hopper: the kernel on the CPU against float64, and its code as compiled."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import pull_by_definition
import roles_on_cpu
from test_rows_scan import type_of

from parallelflow.kernels.chunks import known_chunks, regular_chunks
from parallelflow.kernels.hopper import rows_pull
from parallelflow.kernels.rows import pull
from parallelflow.kernels.rows.layout import MIDDLE, NO_DECAY, SCALAR_DECAY, VECTOR_DECAY, WHOLE, Factor, Layout
from parallelflow.kernels.rows.pairs import Pairs
from parallelflow.testing import relative_error

TWO_PROGRAMS = 115_712  # bytes each, of a multiprocessor that has 228 KB and keeps 1 KB for each
SPILLED = 256  # bytes of addresses, put aside once
SERIALISED = {"C7510", "C7512", "C7514"}

UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
ROUNDINGS = 4  # of pairs, of both sides' operands and of the result
# name: reading and lone rows, tokens a chunk, K, V, decay, raw, sequential, read coefficients, tied
KINDS = {
    "kda": (1, 0, 64, 128, 128, VECTOR_DECAY, False, False, True, True),
    "kda-64": (1, 0, 64, 64, 64, VECTOR_DECAY, False, False, True, True),
    "untied": (1, 0, 64, 128, 128, VECTOR_DECAY, False, False, 1, False),
    "factors": (1, 0, 64, 64, 64, VECTOR_DECAY, False, False, 2, False),
    "gla": (0, 1, 64, 128, 64, VECTOR_DECAY, False, False, False, False),
    "rwkv7": (1, 1, 64, 64, 64, VECTOR_DECAY, True, False, False, False),
    "tied and lone": (1, 1, 64, 64, 64, VECTOR_DECAY, True, False, True, True),
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
        arrays.d_source, arrays.d_output, arrays.entries, arrays.exits, total, floors,
        Pairs(None, None, None, None, None, None), layout, chunks, scale, rows_pull.HOPPER)  # fmt: skip


STRENGTH = {NO_DECAY: 0.0, SCALAR_DECAY: 30.0, VECTOR_DECAY: 0.02}  # a chunk's are centred to e^{±1} in float16


def where(layout, packed):
    """Sequences and chunks: two alike, or packed ones of two chunks, none, one token, one chunk and some."""
    c = layout.C
    if packed:
        starts = (0, c + 6, c + 6, c + 7, 2 * c + 16)
        return 1, starts[-1], known_chunks(starts, c, torch.device("cpu"))
    return 2, c + 11, regular_chunks(2, c + 11, c)


@pytest.fixture
def on_the_cpu(monkeypatch):
    roles_on_cpu.take_over(monkeypatch, rows_pull, ("rows", "places", "blocks"))
    monkeypatch.setattr(pull, "bind", lambda kernel, **constants: lambda *arguments: None)  # strong decays


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_their_definition(on_the_cpu, kind, packed):
    dtype = torch.float16 if packed else torch.bfloat16
    own = 1 if packed else 2  # two value heads that share the others: gradients in float32, to be summed
    layout, coefficients, tied = layout_of(kind, own)
    batch, time, chunks = where(layout, packed)
    arrays = pull_by_definition.draw(
        layout, chunks, batch, time, dtype, coefficients, tied, own, STRENGTH[layout.decay])  # fmt: skip
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


def test_chunks_of_strong_decays_are_left_alone(on_the_cpu):
    """They are the portable kernel's: of the four chunks and heads here all but one."""
    layout, coefficients, tied = layout_of("kda-64", 2)
    batch, time, chunks = 1, 128, regular_chunks(1, 128, 64)
    arrays = pull_by_definition.draw(layout, chunks, batch, time, torch.bfloat16, coefficients, tied, 2)
    floors = torch.full((4,), MIDDLE, dtype=torch.int32)
    floors[2] = WHOLE  # the first head of the second chunk
    fresh = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *sizes, **options: fresh(*sizes, **options).fill_(torch.nan))
        found = pulled(layout, chunks, arrays, floors, 1.0)
    for gradient in (found.query, found.write, found.log_decay[:, :, None]):
        written = gradient.isfinite().all(-1)[0, :, 0]
        assert written[64:, 0].all()
        assert not written[:64].any()
        assert not written[:, 1].any()


@pytest.mark.parametrize("kind", ["kda", "gla", "rwkv7", "factors", "comba", "gated-product-3", "product-2"])
def test_it_compiles(compile_for_hopper, monkeypatch, kind):
    """Two programs fit a multiprocessor; only addresses are spilled, ptxas serialises no product and reads no register
    that nothing wrote."""
    layout, coefficients, tied = layout_of(kind, 2)
    batch, time, chunks = where(layout, True)
    dtype = torch.float16 if kind == "factors" else torch.bfloat16
    arrays = pull_by_definition.draw(layout, chunks, batch, time, dtype, coefficients, tied, 2)
    made = []

    def bound(kernel, **constants):
        def launch(programs, *arguments):
            given = dict(zip(kernel.arg_names, arguments, strict=False))
            types = {name: type_of(x) for name, x in given.items() if x is not None}
            options = {name: value for name, value in constants.items() if name in kernel.arg_names}
            options |= {name: None for name, x in given.items() if x is None}
            made.append(compile_for_hopper(kernel, types, options, None, constants["num_warps"]))

        return launch

    monkeypatch.setattr(rows_pull, "bind", bound)
    monkeypatch.setattr(pull, "bind", lambda kernel, **constants: lambda *arguments: None)
    floors = torch.zeros(1, dtype=torch.int32)
    pulled(layout, chunks, arrays, floors, 1.0)
    (resources,) = made
    reckoned = rows_pull.shared_bytes(layout, tied)
    assert resources.shared_bytes <= reckoned <= TWO_PROGRAMS
    assert resources.spilled_bytes <= SPILLED
    assert not resources.unwritten
    assert not SERIALISED & set(resources.remarks)


def test_what_it_serves():
    """One row of a family a token where channels have decays of their own; no coefficients a channel; what shared
    memory can hold."""
    layout, coefficients, tied = layout_of("kda", 2)
    chunks = regular_chunks(1, 128, 64)

    def served(read=None, **changes):
        return rows_pull.serves(replace(layout, **changes), chunks, read)

    assert served()
    assert served(decay=SCALAR_DECAY, R=2, C=32)
    assert not served(R=2, C=32)
    assert not served(K=96)
    assert not served(V=512)
    assert not served(decay=SCALAR_DECAY, L=2, C=32)
    key = torch.zeros(1, 128, 1, 2, 128)
    assert served(read=Factor(key, torch.zeros(1, 128, 1, 2)))
    assert not served(read=Factor(key, torch.zeros(1, 128, 1, 2, 128)))
    assert served(read=Factor(key, torch.zeros(1, 128, 1, 2, 128, dtype=torch.bfloat16)))
