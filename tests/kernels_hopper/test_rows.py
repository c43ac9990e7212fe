"""The scan of rows of every kind on Hopper: its roles on the CPU against float64, and its code as compiled."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import roles_on_cpu
import rows_by_definition

from parallelflow.kernels.chunks import known_chunks, regular_chunks
from parallelflow.kernels.hopper import rows_scan
from parallelflow.kernels.rows.layout import NO_DECAY, SCALAR_DECAY, VECTOR_DECAY, Layout
from parallelflow.kernels.rows.scan import forward_scan, recompute_scan, reverse_scan
from parallelflow.testing import relative_error

UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
ROUNDINGS = 4  # of the state, of what is solved for, of the solution and of the result
# name: rows that read, rows that only write, tokens a chunk, K, V, decay, heads of the values written (0: none)
KINDS = {
    "kda": (1, 0, 64, 128, 128, VECTOR_DECAY, 2),
    "kda-64": (1, 0, 64, 64, 64, VECTOR_DECAY, 1),
    "comba": (1, 0, 64, 128, 64, SCALAR_DECAY, 2),
    "gla": (0, 1, 64, 128, 64, VECTOR_DECAY, 0),
    "rwkv7": (1, 1, 64, 64, 64, VECTOR_DECAY, 0),
    "product-2": (2, 0, 32, 128, 64, NO_DECAY, 2),
    "product-4": (4, 0, 16, 64, 128, SCALAR_DECAY, 2),
    "product-8": (8, 0, 8, 64, 64, NO_DECAY, 2),
    "mixed": (1, 4, 16, 64, 64, VECTOR_DECAY, 2),
}
PACKED = (0, 70, 70, 71, 141)


def layout_of(kind, heads=2):
    r, lone, c, k, v, decay, source = KINDS[kind]
    return Layout(C=c, R=r, L=lone, heads=heads, value_heads=heads, K=k, V=v, decay=decay, raw=False,
                  sequential=False), source  # fmt: skip


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Launches run their roles as threads."""
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

    for name in ("rows", "blocks", "vectors"):
        monkeypatch.setattr(rows_scan, name, noting(getattr(rows_scan, name)))
    monkeypatch.setattr(rows_scan, "bind", bound)


def close(found, exact, dtype, what):
    assert found.isfinite().all(), what
    error = relative_error(found, exact)
    assert error <= ROUNDINGS * UNIT[dtype], f"{what}: {error:.1e}"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scans_are_their_definition(on_the_cpu, kind, packed):
    dtype = torch.float16 if packed else torch.bfloat16
    layout, source_heads = layout_of(kind)
    batch, time = (1, PACKED[-1]) if packed else (2, 150 if layout.C > 16 else 37)
    starts = PACKED if packed else (0, time, 2 * time)
    chunks = known_chunks(starts, layout.C, torch.device("cpu")) if packed else regular_chunks(batch, time, layout.C)
    p, source, given, d_output, initial, d_final = rows_by_definition.draw(
        layout, chunks, batch, time, dtype, source_heads)  # fmt: skip
    launch = rows_scan.launch
    said, final = forward_scan(launch, p, source, given, layout, chunks, initial_state=initial, final_state=True)
    entries, solution = recompute_scan(launch, p, source, given, layout, chunks, initial_state=initial)
    exact = rows_by_definition.scan(
        layout, starts, p.reads, p.writes, p.queries, p.lone, p.inverse, p.lone_gram, p.scores, p.lone_scores, p.total,
        source, given, initial, False)  # fmt: skip
    close(said, exact[0].squeeze(2), dtype, "output")
    close(entries.mT, exact[2], dtype, "entry states")
    close(final, exact[3], dtype, "final states")
    if layout.R:
        close(solution, exact[1], dtype, "X")
    exits, d_source, d_given, d_initial = reverse_scan(
        launch, p, d_output, layout, chunks, d_final_state=d_final, initial_gradient=True)  # fmt: skip
    turned = [None if x is None else x.mT for x in (p.inverse, p.scores, p.lone_gram, p.lone_scores)]
    exact = rows_by_definition.scan(
        layout, starts, p.writes, p.reads, p.lone, p.queries, *turned, p.total, None, d_output[:, :, None], d_final,
        True)  # fmt: skip
    close(exits.mT, exact[2], dtype, "exit gradients")
    close(d_initial, exact[3], dtype, "initial gradients")
    if layout.R:
        close(d_source, exact[1], dtype, "gradient of U")
    if layout.L:
        close(d_given, exact[0], dtype, "gradient of the lone values")
