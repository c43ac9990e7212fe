"""What Hopper prepares of rows of every kind: its arithmetic on the CPU against float64, and its code as compiled."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import gluon_on_cpu
from test_rows_scan import type_of
from triton import next_power_of_2

from parallelflow.kernels.chunks import known_chunks, regular_chunks
from parallelflow.kernels.hopper import rows_gram
from parallelflow.kernels.rows import prepare as preparation
from parallelflow.kernels.rows.layout import (
    MIDDLE,
    NO_DECAY,
    SCALAR_DECAY,
    VECTOR_DECAY,
    WHOLE,
    Factor,
    Layout,
    centred,
)

SHARED_LIMIT = 232_448
SCALE = 0.3
UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
SMALLEST = 2.0**-126  # what counts as 0 in float32
OF_SUMS = 64 * 144 * 0.7 * 2.0**-24  # of e^x where x, up to 144 log 2, is a sum of 64 in float32
ROUNDINGS = 3  # of both operands and of the result
# name: rows that read, rows that only write, tokens a chunk, K, decay, coefficient (-1: reads tied to writes), raw
KINDS = {
    "kda": (1, 0, 64, 128, VECTOR_DECAY, -1, False),
    "gated-delta-2": (1, 0, 64, 64, VECTOR_DECAY, 2, False),
    "gla": (0, 1, 64, 128, VECTOR_DECAY, 0, False),
    "rwkv7": (1, 1, 64, 64, VECTOR_DECAY, 0, True),
    "comba": (1, 0, 64, 64, SCALAR_DECAY, 1, True),
    "product-2": (2, 0, 32, 128, NO_DECAY, -1, False),
    "product-3": (3, 0, 16, 64, SCALAR_DECAY, -1, False),
    "product-8": (8, 0, 8, 64, NO_DECAY, -1, False),
    "mixed": (4, 2, 16, 64, SCALAR_DECAY, 1, True),
}


def layout_of(kind, sequential=False):
    r, lone, c, k, decay, _, raw = KINDS[kind]
    heads = 2 if kind == "product-2" else 1
    return Layout(C=c, R=r, L=lone, heads=heads, value_heads=2, K=k, V=64, decay=decay, raw=raw, sequential=sequential)


def draw(layout, kind, batch, time, dtype, decay="mild", cosine=0.0, dtype_of_decay=torch.float32):
    """query, read factor, write, lone rows and log-decays."""
    generator = torch.Generator().manual_seed(time + layout.K + layout.R)

    def unit(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x / x.norm(dim=-1, keepdim=True)

    def rows(count):
        near = unit(1, 1, 1, layout.heads, layout.K) if cosine else 0.0
        x = cosine**0.5 * near + (1 - cosine) ** 0.5 * unit(batch, time, count, layout.heads, layout.K)
        return (x / x.norm(dim=-1, keepdim=True)).to(dtype)

    coefficient = KINDS[kind][5]
    write = rows(layout.R) if layout.R else None
    read = None
    if write is not None:
        shape = {0: None, 2: write.shape}.get(coefficient, (batch, time, layout.R, layout.value_heads))
        numbers = None if shape is None else torch.rand(*shape, generator=generator) * (2 if cosine else 1)
        read = Factor(write if coefficient == -1 else rows(layout.R), numbers, 1 if numbers is None else -1)
    shape = (batch, time, layout.value_heads) + (layout.K,) * (layout.decay == VECTOR_DECAY)
    uniform = torch.rand(*shape, generator=generator)
    steps = {
        "mild": uniform.mul(0.5).neg(),
        "mixed": torch.where(uniform < 0.02, -20.0, torch.where(uniform < 0.6, -1e-6, 0.0)),
        "strong": torch.where(uniform < 0.3, -100.0, torch.where(uniform < 0.6, -1e-6, 0.0)),
        "resets": torch.where(uniform < 0.1, float("-inf"), -0.1 * uniform),
    }[decay]
    log_decay = None if layout.decay == NO_DECAY else steps.to(dtype_of_decay)
    query, lone = unit(batch, time, layout.heads, layout.K).to(dtype), rows(layout.L) if layout.L else None
    return query, read, write, lone, log_decay


def by_definition(query, read, write, lone, log_decay, layout, first, length, head):
    """The arrays of one chunk and value head in float64, from sums of each stretch of decays."""
    C, K, own = layout.C, layout.K, head // (layout.value_heads // layout.heads)

    def rows(x, count):
        """[tile, K] of a family, token by token, places padded."""
        found = torch.zeros(C, next_power_of_2(count), K, dtype=torch.float64)
        found[:length, :count] = x.flatten(0, 1)[first : first + length].double()
        found = found.flatten(0, 1)
        return torch.cat([found, found.new_zeros(layout.tile(count) - len(found), K)])

    def tokens(count):
        return torch.arange(layout.tile(count)) // next_power_of_2(count)

    steps = torch.zeros(C, K, dtype=torch.float64)
    if log_decay is not None:
        own_decay = log_decay.flatten(0, 1)[first : first + length, head]
        steps[:length] = own_decay.double().reshape(length, -1).clamp(min=-800)
    token = torch.arange(C)

    def between(later, earlier):
        """[later, earlier, K]: the decay after the earlier token up to the later one."""
        after = (token > earlier[:, None])[None] & (token <= later[:, None])[:, None]
        return torch.einsum("pqs,sk->pqk", after.double(), steps).exp()

    def pairs(late, late_token, early, early_token, keep):
        """``late_token``: up to which decays come between."""
        return torch.einsum("pk,qk,pqk->pq", late, early, between(late_token, early_token)) * keep

    start, end = torch.tensor([-1]), torch.tensor([C - 1])
    q = rows(query[:, :, None, own], 1) * SCALE
    t = tokens(1)
    found = {"queries": q * between(t, start)[:, 0]}
    if layout.decay != NO_DECAY:
        found["total"] = between(end, start)[0, 0, : K if layout.decay == VECTOR_DECAY else 1]
    if layout.R:
        b, n = rows(write[:, :, :, own], layout.R), tokens(layout.R)
        vector = read.vector[:, :, :, own].double()
        if read.kind == 1:
            vector = vector * read.coefficient[..., head, None]
        if read.kind == 2:
            vector = vector * read.coefficient[:, :, :, own]
        a = rows(vector * read.sign, layout.R)
        reach = n - 1 if layout.raw else n
        keep = n[:, None] > n
        if layout.sequential:
            keep = torch.ones(len(n), len(n)).tril(-1).bool()
        gram = pairs(a, reach, b, n, keep)
        eye = torch.eye(len(n), dtype=torch.float64)
        found |= {
            "reads": a * between(reach, start)[:, 0], "writes": b * between(end, n)[0],
            "inverse": torch.linalg.solve_triangular(eye - gram, eye, upper=False),
            "scores": pairs(q, t, b, n, t[:, None] >= n), "gram": gram,
        }  # fmt: skip
    if layout.L:
        w, m = rows(lone[:, :, :, own], layout.L), tokens(layout.L)
        found |= {"lone": w * between(end, m)[0], "lone_scores": pairs(q, t, w, m, t[:, None] >= m)}
        if layout.R:
            found["lone_gram"] = pairs(a, reach, w, m, n[:, None] > m)
    return found


def on_the_cpu(kernel, **constants):
    """In place of ``bind``: launches run on the CPU."""

    def launch(programs, *arguments):
        options = {name: value for name, value in constants.items() if name in kernel.arg_names}
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        gluon_on_cpu.run(kernel, programs, {name: named[name] for name in kernel.arg_names})

    return launch


def compiled(compile_for_hopper, made):
    """In place of ``bind``: launches compile, and put what that takes into ``made``."""

    def bound(kernel, **constants):
        def launch(programs, *arguments):
            named = dict(zip(kernel.arg_names, arguments, strict=False))
            options = {name: value for name, value in constants.items() if name in kernel.arg_names}
            options |= {name: None for name, x in named.items() if x is None}
            types = {name: "fp32" if isinstance(x, float) else type_of(x) for name, x in named.items() if x is not None}
            made.append(compile_for_hopper(kernel, types, options, constants.get("maxnreg"), constants["num_warps"]))

        return launch

    return bound


@pytest.fixture
def prepare(monkeypatch):
    """``prepare`` by the kernel alone, on the CPU, into memory that held NaN."""

    def launch(*arguments):
        for name, tensor in arguments[5]._asdict().items():
            if tensor is not None and not (name == "writes" and tensor is arguments[2]):
                tensor.fill_(-1 if name == "floors" else torch.nan)
        rows_gram.launch(*arguments)

    monkeypatch.setattr(rows_gram, "bind", on_the_cpu)
    monkeypatch.setattr(preparation, "_prepare_here", lambda *_: None)
    return lambda *arguments: preparation.prepare(*arguments, SCALE, launch)


def of_chunk(found, name, layout, chunk, first, length, head):
    """What lies in one array of a chunk and value head; rows as [tokens, places, K]."""
    array = getattr(found, name)
    if name not in ("queries", "reads", "writes", "lone"):
        return array.view(-1, layout.value_heads, *array.shape[1:])[chunk, head]
    return array.flatten(0, 1)[first : first + length, :, head if array.shape[3] > 1 else 0]


def errors(found, arrays, layout, starts, chunks=None):
    """Relative errors by array, of all chunks or of these."""
    pairs, chunk = {}, 0
    for begin, end in pairwise(starts):
        for first in range(begin, end, layout.C):
            length = min(layout.C, end - first)
            for head in range(layout.value_heads if chunks is None or chunk in chunks else 0):
                for name, exact in by_definition(*arrays, layout, first, length, head).items():
                    if getattr(found, name, None) is None:
                        continue
                    got = of_chunk(found, name, layout, chunk, first, length, head)
                    if name in ("queries", "reads", "writes", "lone"):
                        exact = exact.view(-1, next_power_of_2(got.shape[1]), layout.K)[:length, : got.shape[1]]
                    pairs.setdefault(name, []).append((got.double().flatten(), exact.flatten()))
            chunk += 1
    together = {name: [torch.cat(each) for each in zip(*every, strict=True)] for name, every in pairs.items()}
    return {name: ((got - exact).norm() / (exact.norm() + SMALLEST)).item() for name, (got, exact) in together.items()}


def check(found, arrays, layout, starts, dtype, chunks=None):
    for name, error in errors(found, arrays, layout, starts, chunks).items():
        allowed = OF_SUMS if name == "total" else ROUNDINGS * UNIT[dtype]
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_their_definition(prepare, kind, packed):
    layout, dtype = layout_of(kind), torch.float16 if packed else torch.bfloat16
    c = layout.C
    starts = (0, c + 6, c + 6, c + 7) if packed else (0, c + 5, 2 * c + 10)
    batch, time = (1, starts[-1]) if packed else (2, starts[1])
    chunks = known_chunks(starts, c, torch.device("cpu")) if packed else regular_chunks(batch, time, c)
    arrays = draw(layout, kind, batch, time, dtype)
    if dtype is torch.float16 and layout.decay == VECTOR_DECAY:
        arrays[-1].mul_(0.1)
    found = prepare(*arrays, layout, chunks)
    check(found, arrays, layout, starts, dtype)
    assert (found.writes is arrays[2]) == (kind == "product-2" or layout.R == 0)
    if layout.decay == VECTOR_DECAY:
        assert set(found.floors.tolist()) == {WHOLE}


@pytest.mark.parametrize("decay", ["mixed", "strong", "resets"])
@pytest.mark.parametrize("kind", ["comba", "product-3", "mixed"])
def test_decays_of_every_strength_a_head(prepare, kind, decay):
    layout = layout_of(kind, sequential=kind == "product-3")
    arrays = draw(layout, kind, 1, 2 * layout.C, torch.bfloat16, decay, cosine=0.999)
    found = prepare(*arrays, layout, regular_chunks(1, 2 * layout.C, layout.C))
    check(found, arrays, layout, (0, 2 * layout.C), torch.bfloat16)


@pytest.mark.parametrize("kind", ["kda", "rwkv7", "gla"])
def test_chunks_of_strong_decays_are_named(prepare, kind):
    """The others are done, to the very sum of decays that may be centred, in decays of 16 bits too."""
    layout = layout_of(kind)
    arrays = draw(layout, kind, 1, 192, torch.bfloat16, "mixed", dtype_of_decay=torch.bfloat16)
    steps = arrays[-1]
    most = centred(torch.bfloat16) * 0.6931
    steps.fill_(-0.01)
    steps[:, :64] = -most / 64 * 0.99  # a little less than the most
    steps[:, 64:128, 1, 5] = -most / 64 * 1.02  # in one channel of one head a little more
    steps[:, 130, 0, 3] = float("-inf")
    found = prepare(*arrays, layout, regular_chunks(1, 192, 64))
    weak = [WHOLE, WHOLE, WHOLE, MIDDLE, MIDDLE, WHOLE]
    assert found.floors.tolist() == weak
    check(found, arrays, layout, (0, 192), torch.bfloat16, chunks=(0,))


def test_correlated_keys(prepare):
    """The inverse holds where powers of G would lose every digit."""
    for kind in ("kda", "product-2"):
        layout = layout_of(kind, sequential=kind == "product-2")
        arrays = draw(layout, kind, 1, 64, torch.bfloat16, cosine=0.999)
        found = prepare(*arrays, layout, regular_chunks(1, 64, layout.C))
        check(found, arrays, layout, (0, 64), torch.bfloat16)


def test_a_sequence_of_nan_stays_alone(prepare):
    layout = layout_of("kda")
    arrays = draw(layout, "kda", 1, 128, torch.bfloat16)
    arrays[2][:, 64:] = torch.nan
    found = prepare(*arrays, layout, regular_chunks(1, 128, 64))
    check(found, arrays, layout, (0, 128), torch.bfloat16, chunks=(0,))
    assert not found.inverse[2:].isfinite().all()


@pytest.mark.parametrize("kind", ["kda", "rwkv7", "product-3"])
def test_it_compiles(compile_for_hopper, monkeypatch, kind):
    """Three programs fit a multiprocessor's memory; no register is spilled, and ptxas forgets none."""
    layout, made = layout_of(kind), []
    monkeypatch.setattr(rows_gram, "bind", compiled(compile_for_hopper, made))
    monkeypatch.setattr(preparation, "_prepare_here", lambda *_: None)
    arrays = draw(layout, kind, 1, 130, torch.bfloat16)
    preparation.prepare(*arrays, layout, regular_chunks(1, 130, layout.C), SCALE, rows_gram.launch)
    (resources,) = made
    assert resources.shared_bytes <= SHARED_LIMIT // 3 - 1024
    assert resources.spilled_bytes == 0
    assert not resources.unwritten


def test_what_fits():
    """What is left to the portable kernels: smaller tiles, several rows with decays a channel, arrays off 16 bytes."""
    layout = layout_of("rwkv7")
    arrays = draw(layout, "rwkv7", 1, 64, torch.bfloat16)
    assert rows_gram.fits(layout, *arrays)
    assert not rows_gram.fits(replace(layout, C=16, L=4), *arrays)
    assert not rows_gram.fits(replace(layout, C=32, R=2), *arrays)
    for place, tensor in ((0, arrays[0]), (2, arrays[2]), (4, arrays[4])):
        moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
        assert not rows_gram.fits(layout, *arrays[:place], moved, *arrays[place + 1 :])
