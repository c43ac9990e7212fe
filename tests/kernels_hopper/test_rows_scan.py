"""The scan of rows of every kind on Hopper: its roles on the CPU against float64, and its code as compiled."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import roles_on_cpu
import rows_by_definition

from parallelflow.kernels import segments
from parallelflow.kernels.chunks import known_chunks, regular_chunks
from parallelflow.kernels.hopper import rows_scan
from parallelflow.kernels.rows.layout import NO_DECAY, SCALAR_DECAY, VECTOR_DECAY, Factor, Layout
from parallelflow.kernels.rows.products import weights_of
from parallelflow.kernels.rows.scan import (
    flow_scan,
    forward_scan,
    recompute_scan,
    reverse_flow_scan,
    reverse_scan,
    states_and_rows,
)
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
    "product-3": (3, 0, 16, 128, 64, NO_DECAY, 2),
    "product-4": (4, 0, 16, 64, 128, SCALAR_DECAY, 2),
    "product-8": (8, 0, 8, 64, 64, NO_DECAY, 2),
    "mixed": (1, 4, 16, 64, 64, VECTOR_DECAY, 2),
}


def lengths(layout, packed):
    """Where sequences begin: one of two chunks, one empty, one of a token, one longer than the rings; or two alike."""
    c = layout.C
    return (0, c + 6, c + 6, c + 7, 6 * c + 16) if packed else (0, 2 * c + 22, 4 * c + 44)


def layout_of(kind, heads=2):
    r, lone, c, k, v, decay, source = KINDS[kind]
    return Layout(C=c, R=r, L=lone, heads=heads, value_heads=heads, K=k, V=v, decay=decay, raw=False,
                  sequential=False), source  # fmt: skip


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Launches run their roles as threads."""
    roles_on_cpu.take_over(monkeypatch, rows_scan, ("rows", "places", "blocks", "vectors"))
    monkeypatch.setattr(rows_scan, "weights_of", rows_by_definition.weights_of)


def close(found, exact, dtype, what):
    assert found.isfinite().all(), what
    error = relative_error(found, exact)
    assert error <= ROUNDINGS * UNIT[dtype], f"{what}: {error:.1e}"


def compare(layout, starts, chunks, cut, source_heads, dtype):
    """All scans beside their definition over whole sequences."""
    batch, time = (1, starts[-1]) if chunks.packed else (chunks.sequences, chunks.time)
    p, source, given, d_output, initial, d_final = rows_by_definition.draw(
        layout, chunks, batch, time, dtype, source_heads)  # fmt: skip
    launch, state, d_exit = rows_scan.launch, initial, d_final
    if cut is not None:
        flows = flow_scan(launch, p, source, given, layout, cut, initial_state=initial)
        sources = reverse_flow_scan(launch, p, d_output, layout, cut, d_final_state=d_final)
        state = rows_by_definition.composed(cut, flows, flows, p.total, initial, False)
        d_exit = rows_by_definition.composed(cut, flows, sources, p.total, d_final, True)
    where = (layout, chunks, cut)
    said, final = forward_scan(launch, p, source, given, *where, initial_state=state, final_state=True)
    entries, solution = states_and_rows(p, layout, chunks)
    recompute_scan(launch, p, source, given, *where, initial_state=state, into=(entries, solution))
    exact = rows_by_definition.scan(
        layout, starts, p.reads, p.writes, p.queries, p.lone, p.inverse, p.lone_gram, p.scores, p.lone_scores, p.total,
        source, given, initial, False)  # fmt: skip
    close(said, exact[0].squeeze(2), dtype, "output")
    close(entries.mT, exact[2], dtype, "entry states")
    close(final, exact[3], dtype, "final states")
    if layout.R:
        close(solution, exact[1], dtype, "X")
    exits, d_source, d_given, d_initial = reverse_scan(
        launch, p, d_output, *where, d_final_state=d_exit, initial_gradient=True)  # fmt: skip
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scans_are_their_definition(on_the_cpu, kind, packed):
    layout, source_heads = layout_of(kind)
    starts = lengths(layout, packed)
    chunks = (
        known_chunks(starts, layout.C, torch.device("cpu")) if packed else regular_chunks(2, starts[1], layout.C)
    )  # fmt: skip
    compare(layout, starts, chunks, None, source_heads, torch.float16 if packed else torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "packed"),
    [("kda-64", False), ("comba", True), ("gla", True), ("rwkv7", False), ("rwkv7", True), ("product-3", True),
     ("product-4", False), ("mixed", True)],
)  # fmt: skip
def test_segments_are_the_whole(on_the_cpu, kind, packed):
    """Two sequences, each chunk a segment; or packed ones in two segments, one (empty), one and three."""
    layout, source_heads = layout_of(kind)
    starts = lengths(layout, packed)
    device = torch.device("cpu")
    chunks = known_chunks(starts, layout.C, device) if packed else regular_chunks(2, starts[1], layout.C)
    cut = segments._tables(starts, layout.C, (1, 1, 1, 2) if packed else (1, 1), device)
    assert cut.flows >= 3
    compare(layout, starts, chunks, cut, source_heads, torch.float16 if packed else torch.bfloat16)


DIRECTIONS = {
    "forward": lambda launch, p, source, given, d_output, initial, d_final, *where: forward_scan(
        launch, p, source, given, *where, initial_state=initial, final_state=True),
    "again": lambda launch, p, source, given, d_output, initial, d_final, *where: recompute_scan(
        launch, p, source, given, *where, initial_state=initial, into=states_and_rows(p, *where[:2])),
    "reverse": lambda launch, p, source, given, d_output, initial, d_final, *where: reverse_scan(
        launch, p, d_output, *where, d_final_state=d_final, initial_gradient=True),
    "flow": lambda launch, p, source, given, d_output, initial, d_final, layout, chunks, cut: flow_scan(
        launch, p, source, given, layout, cut, initial_state=initial),
    "reverse flow": lambda launch, p, source, given, d_output, initial, d_final, layout, chunks, cut: reverse_flow_scan(
        launch, p, d_output, layout, cut, d_final_state=d_final),
}  # fmt: skip
COMPILED = [
    ("kda", "forward"), ("kda", "again"), ("kda", "reverse"), ("comba", "forward"), ("gla", "forward"),
    ("gla", "reverse"), ("rwkv7", "forward"), ("rwkv7", "reverse"), ("product-2", "forward"), ("product-2", "reverse"),
    ("product-3", "forward"), ("product-8", "reverse"), ("kda", "flow"), ("gla", "flow"), ("rwkv7", "flow"),
    ("product-3", "flow"), ("kda", "two flows"), ("gla", "two flows"), ("rwkv7", "two flows"),
    ("product-4", "two flows"), ("kda", "reverse flow"), ("gla", "reverse flow"),
    ("rwkv7", "reverse flow"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "direction"), COMPILED)
def test_it_compiles(compile_for_hopper, monkeypatch, kind, direction):
    """It takes no more of a multiprocessor's memory than was reckoned, spills nothing, and ptxas serialises none of its
    products."""
    layout, source_heads = layout_of(kind)
    dtype = torch.float16 if direction == "again" else torch.bfloat16
    starts = lengths(layout, True)
    chunks = known_chunks(starts, layout.C, torch.device("cpu"))
    made = []

    def bound(kernel, **constants):
        def launch(programs, *arguments):
            options = {name: value for name, value in constants.items() if name in kernel.arg_names}
            types = {name: type_of(x) for name, x in zip(kernel.arg_names, arguments, strict=False)}
            made.append(options)
            made.append(compile_for_hopper(kernel, types, options, constants["maxnreg"], constants["num_warps"]))

        return launch

    monkeypatch.setattr(rows_scan, "bind", bound)
    monkeypatch.setattr(rows_scan, "weights_of", rows_by_definition.weights_of)
    two = direction == "two flows"  # on a multiprocessor, where there are more than one can have each
    if two:
        monkeypatch.setattr(rows_scan, "processors", lambda device: 1)
    arrays = rows_by_definition.draw(layout, chunks, 1, starts[-1], dtype, source_heads)
    cut = segments._tables(starts, layout.C, (1, 1, 1, 2), torch.device("cpu"))
    DIRECTIONS[direction.removeprefix("two ").replace("flows", "flow")](rows_scan.launch, *arrays, layout, chunks, cut)
    options, resources = made
    room = (options[name] for name in ("STAGES", "DEPTH", "PAIRS"))
    hand = not options["FLOW"]
    reckoned = rows_scan.shared_bytes(layout, options["REVERSE"], options["SOURCE"] > 0, options["SAY"], hand, *room)
    most = rows_scan.TWO if two else rows_scan.SHARED_BYTES
    assert resources.shared_bytes <= reckoned <= most
    assert resources.spilled_bytes == 0
    assert not resources.unwritten
    assert not {"C7510", "C7512", "C7514"} & set(resources.remarks)


def type_of(argument):
    """How a signature names an argument's type."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
    if isinstance(argument, torch.Tensor):
        return f"*{names[argument.dtype]}"
    if isinstance(argument, (int, float)):
        return "i32" if isinstance(argument, int) else "fp32"
    block = ",".join(map(str, argument.block_shape))
    return f"tensordesc<{names[argument.base.dtype]}[{block}],{argument.layout!r}>"


def test_what_fits():
    """A case that shared memory cannot hold is left to the portable scan; so is every case without a Hopper GPU."""
    layout, _ = layout_of("kda")
    assert not rows_scan.fits(layout, torch.zeros(1, 64, 2, 128, dtype=torch.bfloat16))
    wide = Layout(C=64, R=1, L=1, heads=1, value_heads=1, K=128, V=128, decay=VECTOR_DECAY, raw=False, sequential=False)
    assert rows_scan.rings(wide, False, False, True, False) is None
    assert rows_scan.rings(wide, False, False, False, True) is not None
    for tokens, reached in ((2**25, True), (2**26, False)):  # 2 heads of 128 in chunks of 64: 2**31 of the second
        chunks = regular_chunks(1, tokens * 8, layout.C)
        assert rows_scan.reaches(layout, chunks) == reached


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compared in Triton's interpreter")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["kda", "product-3", "product-8"])
def test_weights_lie_as_the_rows_do(kind, packed):
    layout, _ = layout_of(kind, heads=6)
    starts = lengths(layout, packed)
    batch, time = (1, starts[-1]) if packed else (2, starts[1])
    chunks = known_chunks(starts, layout.C, torch.device("cpu")) if packed else regular_chunks(batch, time, layout.C)
    coefficient = torch.randn(batch, time, layout.R, 3, generator=torch.Generator().manual_seed(0))
    factor = Factor(coefficient[..., None], coefficient, -1)
    found = weights_of(factor, layout, chunks)
    assert torch.equal(found, rows_by_definition.weights_of(factor, layout, chunks))
