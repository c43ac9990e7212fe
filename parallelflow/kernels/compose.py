"""The segments' flows composed: the state at every segment's entry, the gradient at every segment's exit.

    S_{g+1} = P_g S_g + H_g                 dS_{g-1} = P_g^T dS_g + dH_g

along the few segments of a sequence, in float32 (products by three TF32 passes or IEEE).  P is a matrix for rows that
read, and the product of the chunks' decays, one or one a key channel, for rows that only write.  Where a segment has
forgotten its entry state P is zero, and nothing else has to be known about it.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import bind
from .products import float32_precision
from .segments import Segments


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit(do_not_specialize=["sequences"])
def compose_kernel(given, flows, sources, total, results, first, offsets, sequences,
                   HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                   STEP: tl.constexpr, CHUNKS: tl.constexpr, DENSE: tl.constexpr, DECAYS: tl.constexpr,
                   REVERSE: tl.constexpr, GIVEN: tl.constexpr, STAGES: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """One sequence, value head and tile of value channels, from its first segment to its last, or back (REVERSE).

    flows [F, HV, K, V + K] are [H | P] ([F, HV, K, V], H, if not DENSE), sources the H in whose direction it goes.  The
    first of them, in that direction, holds what the given state becomes already: no P is needed there.  total [M, HV]
    or [M, HV, K]: DECAYS numbers (0: no decay) a chunk and head.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % HV
    sequence = (tl.program_id(0) // tiles // HV).to(tl.int64)
    begin = tl.load(first + sequence)
    count = tl.load(first + sequence + 1) - begin
    begin = begin.to(tl.int64)
    row = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    inside = (row < K)[:, None] & (column < V)[None, :]
    if GIVEN:
        whole_state = ((sequence * HV + head) * K + row[:, None]) * V + column[None, :]
        state = tl.load(given + whole_state, mask=inside, other=0.0)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    WIDTH: tl.constexpr = V + K if DENSE else V
    SOURCE: tl.constexpr = V if REVERSE else WIDTH
    place = row[:, None] * V + column[None, :]
    source_place = row[:, None] * SOURCE + column[None, :]
    tl.store(results + ((begin + (count - 1 if REVERSE else 0)) * HV + head) * K * V + place, state, mask=inside)
    # Of a sequence's flows the leading begin with its first segment, the trailing with its second; those that are taken
    # come one after another, in the direction in which it goes.
    first_source = begin - sequence + (count - 2 if REVERSE else 0)
    if count > 1:
        state = tl.load(sources + (first_source * HV + head) * K * SOURCE + source_place, mask=inside, other=0.0)
    for step in tl.range(1, count - 1, num_stages=STAGES):
        segment = begin + (count - 1 - step if REVERSE else step)
        result = results + (segment * HV + head) * K * V
        tl.store(result + place, state, mask=inside)
        source = ((first_source + (-step if REVERSE else step)) * HV + head) * K * SOURCE
        following = tl.load(sources + source + source_place, mask=inside, other=0.0)
        if DENSE:
            flow = flows + ((segment - sequence) * HV + head) * K * WIDTH + V
            if STEP < BK:
                tl.debug_barrier()  # the state was stored by other threads than those that read it now
            for part in tl.static_range(0, K, STEP):
                along = part + tl.arange(0, STEP)
                if REVERSE:
                    p_place = along[None, :] * WIDTH + row[:, None]
                else:
                    p_place = row[:, None] * WIDTH + along[None, :]
                p = tl.load(flow + p_place, mask=(row < K)[:, None] & (along < K)[None, :], other=0.0)
                if STEP < BK:
                    s = tl.load(result + along[:, None] * V + column[None, :],
                                mask=(along < K)[:, None] & (column < V)[None, :], other=0.0)  # fmt: skip
                else:
                    s = state
                following = tl.dot(p, s, following, input_precision=PRECISION)
        elif DECAYS == 0:
            following += state
        else:
            chunk = tl.load(offsets + segment)
            end = tl.load(offsets + segment + 1)
            decay = tl.full([BK if DECAYS > 1 else 1], 1.0, tl.float32)
            while chunk < end:
                index = chunk + tl.arange(0, CHUNKS)
                at = (index.to(tl.int64) * HV + head)[:, None] * DECAYS
                channel = row if DECAYS > 1 else tl.arange(0, 1)
                there = (index < end)[:, None] & (channel < DECAYS)[None, :]
                factors = tl.load(total + at + channel[None, :], mask=there, other=1.0)
                decay *= tl.reduce(factors, 0, multiply)
                chunk += CHUNKS
            following += state * decay[:, None]
        state = following
    if count > 1:
        last = begin + (0 if REVERSE else count - 1)
        tl.store(results + (last * HV + head) * K * V + place, state, mask=inside)


def entry_states(flows: Tensor, total: Tensor | None, segments: Segments, initial_state: Tensor | None, *, dense: bool,
                 into: Tensor) -> None:  # fmt: skip
    """The state at each segment's entry, [S, HV, K, V], from the flows of the leading segments (``flow_scan``)."""
    _compose(initial_state, flows, flows, total, segments, into, dense, False)


def exit_gradients(flows: Tensor, sources: Tensor, total: Tensor | None, segments: Segments,
                   d_final_state: Tensor | None, *, dense: bool, into: Tensor) -> None:  # fmt: skip
    """The gradient of the state at each segment's exit, [S, HV, K, V], from the forward's flows and what the trailing
    segments add (``reverse_flow_scan``)."""
    _compose(d_final_state, flows, sources, total, segments, into, dense, True)


def _compose(given, flows, sources, total, segments, results, dense, reverse) -> None:
    _, value_heads, key_dim, value_dim = results.shape
    width = max(16, triton.next_power_of_2(key_dim))
    decays = 0 if total is None else total.numel() // (segments.layout.count * value_heads)
    launch = bind(
        compose_kernel, HV=value_heads, K=key_dim, V=value_dim, BK=width, BV=16,
        STEP=width if width <= 128 else 64, CHUNKS=max(8192 // width, 16) if decays > 1 else 64, DENSE=dense,
        DECAYS=decays, REVERSE=reverse, GIVEN=given is not None, STAGES=2 if dense and width <= 128 else 1,
        PRECISION=float32_precision(results.device), num_warps=8 if width >= 128 else 4)  # fmt: skip
    launch(
        segments.sequences * value_heads * triton.cdiv(value_dim, 16),
        given, flows, sources, total, results, segments.first, segments.layout.offsets, segments.sequences)  # fmt: skip
