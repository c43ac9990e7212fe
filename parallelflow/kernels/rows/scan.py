"""The scan: the state from chunk to chunk, and, turned around in time, its gradient.

One program carries the state of one sequence, value head and tile of value channels, transposed, S^T [BV, K]. Per chunk

    X = T (U + reads S + couple given)            said = says S + own X + through given
    S <- total S + writes^T X + gives^T given

Forward: given are the lone rows' values, said the outputs. In reverse S is the gradient of the state; reads and writes
change places, says and gives too, and each matrix is transposed: given is the outputs' gradient, X that of U, said that
of the lone rows' values (`parallelflow.system.System.transposed` has the same in plain tensors).

The flows S -> P S + H of segments (``kernels/segments.py``) come from the same kernel: H is the final state from zero,
P that from the identity without U and given, K more value channels. In reverse no P is wanted: it is the transpose.

The scans of a pass are told what launches them: the kernel here, or Hopper's (``kernels/hopper/rows_scan.py``).
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallelflow.kernels.chunks import Chunks, locate_sequence
from parallelflow.kernels.launch import bind
from parallelflow.kernels.products import float32_precision, product
from parallelflow.kernels.rows.factors import load_factor, load_rows, store_rows
from parallelflow.kernels.rows.layout import SMALLEST_TILE, Factor, Layout, heads_of, width_of
from parallelflow.kernels.rows.prepare import Prepared, of_factor
from parallelflow.kernels.segments import Segments

Launch = Callable[..., Tensor | None]  # ``launch`` below, or Hopper's; what it made for itself and reads


@triton.jit
def matrix(base, flat, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):
    """The matrix [ROWS, COLUMNS] of a chunk, transposed: [COLUMNS, ROWS]; TURNED: of the one stored as [COLUMNS, ROWS],
    as it is."""
    i = tl.arange(0, COLUMNS)[:, None]
    j = tl.arange(0, ROWS)[None, :]
    at = i * ROWS + j if TURNED else j * COLUMNS + i
    return tl.load(base + flat * (ROWS * COLUMNS) + at)


@triton.jit(do_not_specialize=["time", "per_sequence"])
def scan_kernel(reads, writes, says, gives, inverse, couple, own, through, total, source, source_coefficient, given,
                initial, solution, said, states, final, cu_seqlens, offsets, table, time, per_sequence,
                C: tl.constexpr, N: tl.constexpr, S: tl.constexpr, G: tl.constexpr,
                R: tl.constexpr, SAYING: tl.constexpr, GIVING: tl.constexpr,
                HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                DECAY: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, SOURCE: tl.constexpr,
                SOURCE_HEADS: tl.constexpr, SOURCE_KIND: tl.constexpr, SOURCE_COEFFICIENT_HEADS: tl.constexpr,
                SOURCE_SIGN: tl.constexpr, GIVEN_HEADS: tl.constexpr, SAY: tl.constexpr, SAVE: tl.constexpr,
                HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, FLOW: tl.constexpr, OWNED: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Rows a token: R solved for (tile N), SAYING that say (tile S), GIVING that are given (tile G).

    FLOW: ``table`` [F, 2] names segments, each beside the sequence, if any (else -1), whose state it starts from, as
    ``initial`` has it; the others start from zero. The final states are [H | P] (H without R, and in reverse), P left
    open where a segment starts from a sequence's state. OWNED: ``table`` [S] names for each segment the sequence, if
    any, whose final state it ends with.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    UNIT: tl.constexpr = FLOW and R > 0 and not REVERSE
    all_tiles: tl.constexpr = tiles + ((K + BV - 1) // BV if UNIT else 0)
    tile = tl.program_id(0) % all_tiles
    head = (tl.program_id(0) // all_tiles) % HV
    number = tl.program_id(0) // all_tiles // HV
    sequence = number
    starting = number
    owner = number
    if FLOW:
        sequence = tl.load(table + 2 * number)
        starting = tl.load(table + 2 * number + 1)
    if OWNED:
        owner = tl.load(table + number)
    begin, time_here, chunk = locate_sequence(sequence, cu_seqlens, offsets, time, per_sequence, PACKED)
    channel = tile * BV + tl.arange(0, BV)
    column = tl.arange(0, BK)
    across = column[None, :] * V + channel[:, None]  # the state in memory is [K, V]
    inside = (column < K)[None, :] & (channel < V)[:, None]
    if HAS_INITIAL:
        whole = (tl.maximum(starting, 0).to(tl.int64) * HV + head) * K * V
        state = tl.load(initial + whole + across, mask=inside & (starting >= 0), other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    if UNIT:  # channels beyond V, which have neither U nor given
        unit = (tile - tiles) * BV + tl.arange(0, BV)
        state = tl.where((tile >= tiles) & (unit[:, None] == column[None, :]), 1.0, state)
        time_here = tl.where((tile >= tiles) & (starting >= 0), 0, time_here)
    DTYPE: tl.constexpr = says.dtype.element_ty if SAY else writes.dtype.element_ty if R > 0 else gives.dtype.element_ty
    steps = tl.cdiv(time_here, C)
    for count in range(steps):
        step = steps - 1 - count if REVERSE else count
        first = begin + step * C
        length = tl.minimum(time_here - step * C, C)
        valued = tl.where(tile < tiles, length, 0) if UNIT else length  # tokens whose values are there
        flat = (chunk + step).to(tl.int64) * HV + head
        entering = state.to(DTYPE)
        if SAVE:
            saved = channel[:, None] * K + column[None, :]
            tl.store(states + flat * K * V + saved, entering, mask=inside)
        if GIVING > 0:
            u = load_rows(given, first, valued, head, channel, G, GIVING, HV, GIVEN_HEADS, V)
            u = tl.trans(u)
        if R > 0:
            a = load_rows(reads, first, length, head, column, N, R, HV, HV, K)
            x = tl.dot(entering, tl.trans(a), input_precision=PRECISION)
            if SOURCE:
                v = load_factor(source, source_coefficient, first, valued, head, channel, N, R, HV, SOURCE_HEADS,
                                SOURCE_KIND, SOURCE_COEFFICIENT_HEADS, SOURCE_SIGN, V)  # fmt: skip
                x += tl.trans(v)
            if GIVING > 0:
                x += tl.dot(u, matrix(couple, flat, N, G, REVERSE), input_precision=PRECISION)
            x = product(x, matrix(inverse, flat, N, N, REVERSE), PRECISION).to(DTYPE)
            if SAVE:
                store_rows(solution, tl.trans(x), first, length, head, channel, N, R, HV, V)
        if SAY:
            q = load_rows(says, first, length, head, column, S, SAYING, HV, HV, K)
            o = tl.dot(entering, tl.trans(q), input_precision=PRECISION)
            if R > 0:
                o += tl.dot(x, matrix(own, flat, S, N, REVERSE), input_precision=PRECISION)
            if GIVING > 0:
                o += tl.dot(u, matrix(through, flat, S, G, REVERSE), input_precision=PRECISION)
            store_rows(said, tl.trans(o), first, length, head, channel, S, SAYING, HV, V)
        if DECAY == 1:
            state *= tl.load(total + flat)
        if DECAY == 2:
            state *= tl.load(total + flat * K + column, mask=column < K, other=0.0)[None, :]
        if R > 0:
            b = load_rows(writes, first, length, head, column, N, R, HV, HV, K)
            state += tl.dot(x, b, input_precision=PRECISION)
        if GIVING > 0:
            w = load_rows(gives, first, length, head, column, G, GIVING, HV, HV, K)
            state += tl.dot(u, w, input_precision=PRECISION)
    if HAS_FINAL:
        WIDTH: tl.constexpr = V + K if UNIT else V
        there = channel < V
        if UNIT:
            there = tl.where(tile >= tiles, unit < K, there)
            channel = tl.where(tile >= tiles, V + unit, channel)
        whole = (tl.maximum(owner, 0).to(tl.int64) * HV + head) * K * WIDTH
        tl.store(final + whole + column[None, :] * WIDTH + channel[:, None], state,
                 mask=(column < K)[None, :] & there[:, None] & (owner >= 0))  # fmt: skip


def configuration(layout: Layout, element_size: int) -> dict[str, int]:
    """Tile sizes and warps; they depend on head sizes and dtype alone."""
    width = max(SMALLEST_TILE, triton.next_power_of_2(layout.K))  # all of K
    row = width * element_size
    tile = 64 if row <= 256 else 32 if row <= 1024 else 16
    return {"BK": width, "BV": width_of(layout.V, tile), "num_warps": 4, "num_stages": 1}


def programs(layout: Layout, element_size: int) -> tuple[int, int]:
    """How many carry one sequence's state, and how many more the P of a segment."""
    tile = configuration(layout, element_size)["BV"]
    return (layout.value_heads * triton.cdiv(layout.V, tile),
            layout.value_heads * triton.cdiv(layout.K, tile) if layout.R else 0)  # fmt: skip


def launch(layout: Layout, chunks: Chunks, reverse: bool, reads, writes, says, gives, inverse, couple, own, through,
           total, source, given, initial, solution, said, states, final, flows=None, owners=None) -> None:  # fmt: skip
    """One direction of the scan: what is None is not there, or not wanted. ``flows``: the final states are those of
    the segments that it names; ``owners`` names the sequences whose final states segments end with."""
    like = next(each for each in (says, writes, gives) if each is not None)
    options = configuration(layout, like.element_size())
    lone = (layout.L, layout.M)
    saying, giving = (lone, (1, layout.Q)) if reverse else ((1, layout.Q), lone)
    bound = bind(
        scan_kernel, C=layout.C, N=layout.N, S=saying[1], G=giving[1], R=layout.R, SAYING=saying[0], GIVING=giving[0],
        HV=layout.value_heads, K=layout.K, V=layout.V, DECAY=layout.decay, REVERSE=reverse, PACKED=chunks.packed,
        SOURCE=source is not None, **of_factor("SOURCE", source), GIVEN_HEADS=heads_of(given),
        SAY=said is not None, SAVE=states is not None,
        HAS_INITIAL=initial is not None, HAS_FINAL=final is not None, FLOW=flows is not None,
        OWNED=owners is not None, PRECISION=float32_precision(like.device), **options)  # fmt: skip
    values, coefficient = (None, None) if source is None else (source.vector, source.coefficient)
    count, units = programs(layout, like.element_size())
    count = chunks.sequences * count if flows is None else len(flows) * (count + (0 if reverse else units))
    if count:
        bound(count, reads, writes, says, gives, inverse, couple, own, through, total, values, coefficient, given,
              initial, solution, said, states, final, chunks.cu_seqlens, chunks.offsets,
              owners if flows is None else flows, chunks.time, chunks.per_sequence)  # fmt: skip


def _state(like: Tensor, layout: Layout, count: int, more: int = 0) -> Tensor:
    return like.new_empty(count, layout.value_heads, layout.K, layout.V + more, dtype=torch.float32)


def forward_scan(launch: Launch, prepared: Prepared, source: Factor | None, given: Tensor | None, layout: Layout,
                 chunks: Chunks, cut: Segments | None, *, initial_state: Tensor | None,
                 final_state: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Outputs ``[B, T, HV, V]`` and, if asked, the final states ``[N, HV, K, V]`` in float32. Of sequences in segments
    the initial states are those of the segments."""
    batch, time = prepared.queries.shape[:2]
    output = prepared.queries.new_empty(batch, time, layout.value_heads, layout.V)
    final = _state(output, layout, chunks.sequences) if final_state else None
    p = prepared
    launch(layout, chunks if cut is None else cut.layout, False, p.reads, p.writes, p.queries, p.lone, p.inverse,
           p.lone_gram, p.scores, p.lone_scores, p.total, source, given, initial_state, None, output, None, final,
           owners=None if cut is None else cut.ended)  # fmt: skip
    return output, final


def flow_scan(launch: Launch, prepared: Prepared, source: Factor | None, given: Tensor | None, layout: Layout,
              cut: Segments, *, initial_state: Tensor | None) -> Tensor:  # fmt: skip
    """[H | P] of the leading segments, ``[F, HV, K, V + K]`` in float32 ([H] of rows that only write). Of the segment
    that begins a sequence H is what the initial state becomes, and P is left open."""
    p = prepared
    flows = _state(p.queries, layout, cut.flows, layout.K if layout.R else 0)
    launch(layout, cut.layout, False, p.reads, p.writes, None, p.lone, p.inverse, p.lone_gram, None, None, p.total,
           source, given, initial_state, None, None, None, flows, flows=cut.leading)  # fmt: skip
    return flows


def recompute_scan(launch: Launch, prepared: Prepared, source: Factor | None, given: Tensor | None, layout: Layout,
                   chunks: Chunks, cut: Segments | None, *, initial_state: Tensor | None,
                   into: tuple[Tensor, Tensor | None]) -> Tensor | None:  # fmt: skip
    """Transposed states at the chunks' entries ``[chunks, HV, V, K]`` and X ``[B, T, R, HV, V]`` (``states_and_rows``
    makes room). What is returned is read until the scan has ended: whoever runs it aside keeps it until they rejoin."""
    states, solution = into
    p = prepared
    return launch(layout, chunks if cut is None else cut.layout, False, p.reads, p.writes, None, p.lone, p.inverse,
                  p.lone_gram, None, None, p.total, source, given, initial_state, solution, None, states,
                  None)  # fmt: skip


def reverse_scan(launch: Launch, prepared: Prepared, d_output: Tensor, layout: Layout, chunks: Chunks,
                 cut: Segments | None, *, d_final_state: Tensor | None,
                 initial_gradient: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Transposed gradients of the chunks' exit states, of U, of the lone rows' values, of the initial state. Of
    sequences in segments the final states' gradients are those of the segments."""
    states, solution = states_and_rows(prepared, layout, chunks)
    batch, time = d_output.shape[:2]
    d_given = d_output.new_empty(batch, time, layout.L, layout.value_heads, layout.V) if layout.L else None
    d_initial = _state(d_output, layout, chunks.sequences) if initial_gradient else None
    p = prepared
    launch(layout, chunks if cut is None else cut.layout, True, p.writes, p.reads, p.lone, p.queries, p.inverse,
           p.scores, p.lone_gram, p.lone_scores, p.total, None, d_output, d_final_state, solution, d_given, states,
           d_initial, owners=None if cut is None else cut.begun)  # fmt: skip
    return states, solution, d_given, d_initial


def reverse_flow_scan(launch: Launch, prepared: Prepared, d_output: Tensor, layout: Layout, cut: Segments, *,
                      d_final_state: Tensor | None) -> Tensor:  # fmt: skip
    """The gradients of the trailing segments' entry states if those of their exit states were zero, ``[F, HV, K, V]``
    in float32; of the segment that ends a sequence the whole of it, as its final state has a gradient."""
    sources = _state(d_output, layout, cut.flows)
    p = prepared
    launch(layout, cut.layout, True, p.writes, p.reads, None, p.queries, p.inverse, p.scores, None, None, p.total, None,
           d_output, d_final_state, None, None, None, sources, flows=cut.trailing)  # fmt: skip
    return sources


def states_and_rows(prepared: Prepared, layout: Layout, chunks: Chunks) -> tuple[Tensor, Tensor | None]:
    """Room for a scan's states, transposed, and its X."""
    like = prepared.queries
    batch, time = like.shape[:2]
    states = like.new_empty(chunks.count, layout.value_heads, layout.V, layout.K)
    solution = like.new_empty(batch, time, layout.R, layout.value_heads, layout.V) if layout.R else None
    return states, solution
