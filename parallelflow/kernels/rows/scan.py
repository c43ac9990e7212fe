"""The scan: the state from chunk to chunk, and, turned around in time, its gradient.

One program carries the state of one sequence, value head and tile of value channels, transposed, S^T [BV, K]. Per chunk

    X = T (U + reads S + couple given)            said = says S + own X + through given
    S <- total S + writes^T X + gives^T given

Forward: given are the lone rows' values, said the outputs. In reverse S is the gradient of the state; reads and writes
change places, says and gives too, and each matrix is transposed: given is the outputs' gradient, X that of U, said that
of the lone rows' values (`parallelflow.system.System.transposed` has the same in plain tensors).

The three scans of a pass are told what launches them: the kernel here, or Hopper's (``kernels/hopper/rows_scan.py``).
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

Launch = Callable[..., None]  # ``launch`` below, or Hopper's


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
                initial, solution, said, states, final, cu_seqlens, offsets, time, per_sequence,
                C: tl.constexpr, N: tl.constexpr, S: tl.constexpr, G: tl.constexpr,
                R: tl.constexpr, SAYING: tl.constexpr, GIVING: tl.constexpr,
                HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                DECAY: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, SOURCE: tl.constexpr,
                SOURCE_HEADS: tl.constexpr, SOURCE_KIND: tl.constexpr, SOURCE_COEFFICIENT_HEADS: tl.constexpr,
                SOURCE_SIGN: tl.constexpr, GIVEN_HEADS: tl.constexpr, SAY: tl.constexpr, SAVE: tl.constexpr,
                HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows a token: R solved for (tile N), SAYING that say (tile S), GIVING that are given (tile G)."""
    tiles = tl.cdiv(V, BV)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % HV
    sequence = tl.program_id(0) // tiles // HV
    begin, time_here, chunk = locate_sequence(sequence, cu_seqlens, offsets, time, per_sequence, PACKED)
    channel = tile * BV + tl.arange(0, BV)
    column = tl.arange(0, BK)
    across = column[None, :] * V + channel[:, None]  # the state in memory is [K, V]
    inside = (column < K)[None, :] & (channel < V)[:, None]
    whole = (sequence.to(tl.int64) * HV + head) * K * V
    if HAS_INITIAL:
        state = tl.load(initial + whole + across, mask=inside, other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    DTYPE: tl.constexpr = says.dtype.element_ty if SAY else writes.dtype.element_ty if R > 0 else gives.dtype.element_ty
    steps = tl.cdiv(time_here, C)
    for count in range(steps):
        step = steps - 1 - count if REVERSE else count
        first = begin + step * C
        length = tl.minimum(time_here - step * C, C)
        flat = (chunk + step).to(tl.int64) * HV + head
        entering = state.to(DTYPE)
        if SAVE:
            saved = channel[:, None] * K + column[None, :]
            tl.store(states + flat * K * V + saved, entering, mask=inside)
        if GIVING > 0:
            u = load_rows(given, first, length, head, channel, G, GIVING, HV, GIVEN_HEADS, V)
            u = tl.trans(u)
        if R > 0:
            a = load_rows(reads, first, length, head, column, N, R, HV, HV, K)
            x = tl.dot(entering, tl.trans(a), input_precision=PRECISION)
            if SOURCE:
                v = load_factor(source, source_coefficient, first, length, head, channel, N, R, HV, SOURCE_HEADS,
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
        tl.store(final + whole + across, state, mask=inside)


def configuration(layout: Layout, element_size: int) -> dict[str, int]:
    """Tile sizes and warps; they depend on head sizes and dtype alone."""
    width = max(SMALLEST_TILE, triton.next_power_of_2(layout.K))  # all of K
    row = width * element_size
    tile = 64 if row <= 256 else 32 if row <= 1024 else 16
    return {"BK": width, "BV": width_of(layout.V, tile), "num_warps": 4, "num_stages": 1}


def launch(layout: Layout, chunks: Chunks, reverse: bool, reads, writes, says, gives, inverse, couple, own, through,
           total, source, given, initial, solution, said, states, final) -> None:  # fmt: skip
    """One direction of the scan: what is None is not there, or not wanted."""
    like = next(each for each in (says, writes, gives) if each is not None)
    options = configuration(layout, like.element_size())
    lone = (layout.L, layout.M)
    saying, giving = (lone, (1, layout.Q)) if reverse else ((1, layout.Q), lone)
    bound = bind(
        scan_kernel, C=layout.C, N=layout.N, S=saying[1], G=giving[1], R=layout.R, SAYING=saying[0], GIVING=giving[0],
        HV=layout.value_heads, K=layout.K, V=layout.V, DECAY=layout.decay, REVERSE=reverse, PACKED=chunks.packed,
        SOURCE=source is not None, **of_factor("SOURCE", source), GIVEN_HEADS=heads_of(given),
        SAY=said is not None, SAVE=states is not None,
        HAS_INITIAL=initial is not None, HAS_FINAL=final is not None, PRECISION=float32_precision(like.device),
        **options)  # fmt: skip
    values, coefficient = (None, None) if source is None else (source.vector, source.coefficient)
    programs = chunks.sequences * layout.value_heads * triton.cdiv(layout.V, options["BV"])
    if programs:
        bound(programs, reads, writes, says, gives, inverse, couple, own, through, total, values, coefficient, given,
              initial, solution, said, states, final, chunks.cu_seqlens, chunks.offsets, chunks.time,
              chunks.per_sequence)  # fmt: skip


def _state(like: Tensor, layout: Layout, chunks: Chunks, there: bool) -> Tensor | None:
    if not there:
        return None
    return like.new_empty(chunks.sequences, layout.value_heads, layout.K, layout.V, dtype=torch.float32)


def forward_scan(launch: Launch, prepared: Prepared, source: Factor | None, given: Tensor | None, layout: Layout,
                 chunks: Chunks, *, initial_state: Tensor | None,
                 final_state: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Outputs ``[B, T, HV, V]`` and, if asked, the final states ``[N, HV, K, V]`` in float32."""
    batch, time = prepared.queries.shape[:2]
    output = prepared.queries.new_empty(batch, time, layout.value_heads, layout.V)
    final = _state(output, layout, chunks, final_state)
    p = prepared
    launch(layout, chunks, False, p.reads, p.writes, p.queries, p.lone, p.inverse, p.lone_gram, p.scores,
           p.lone_scores, p.total, source, given, initial_state, None, output, None, final)  # fmt: skip
    return output, final


def recompute_scan(launch: Launch, prepared: Prepared, source: Factor | None, given: Tensor | None, layout: Layout,
                   chunks: Chunks, *, initial_state: Tensor | None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Transposed states at the chunks' entries ``[chunks, HV, V, K]`` and X ``[B, T, R, HV, V]``."""
    states, solution = _kept(prepared, layout, chunks)
    p = prepared
    launch(layout, chunks, False, p.reads, p.writes, None, p.lone, p.inverse, p.lone_gram, None, None, p.total, source,
           given, initial_state, solution, None, states, None)  # fmt: skip
    return states, solution


def reverse_scan(launch: Launch, prepared: Prepared, d_output: Tensor, layout: Layout, chunks: Chunks, *,
                 d_final_state: Tensor | None,
                 initial_gradient: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Transposed gradients of the chunks' exit states, of U, of the lone rows' values, of the initial state."""
    states, solution = _kept(prepared, layout, chunks)
    batch, time = d_output.shape[:2]
    d_given = d_output.new_empty(batch, time, layout.L, layout.value_heads, layout.V) if layout.L else None
    d_initial = _state(d_output, layout, chunks, initial_gradient)
    p = prepared
    launch(layout, chunks, True, p.writes, p.reads, p.lone, p.queries, p.inverse, p.scores, p.lone_gram, p.lone_scores,
           p.total, None, d_output, d_final_state, solution, d_given, states, d_initial)  # fmt: skip
    return states, solution, d_given, d_initial


def _kept(prepared: Prepared, layout: Layout, chunks: Chunks) -> tuple[Tensor, Tensor | None]:
    """Room for a scan's states and its X."""
    like = prepared.queries
    batch, time = like.shape[:2]
    states = like.new_empty(chunks.count, layout.value_heads, layout.V, layout.K)
    solution = like.new_empty(batch, time, layout.R, layout.value_heads, layout.V) if layout.R else None
    return states, solution
