"""The segments' flows composed: the state at every segment's entry, the gradient at every segment's exit.

    S_{g+1} = P_g S_g + H_g                 dS_{g-1} = P_g^T dS_g + dH_g

along the few segments of a sequence, in float32 (products by three TF32 passes or IEEE).  P is a matrix for rows that
read, and the product of the chunks' decays for rows that only write.  Where a segment has forgotten its entry state P
is zero, and nothing else has to be known about it.
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
                   STEP: tl.constexpr, CHUNKS: tl.constexpr, TIED: tl.constexpr, REVERSE: tl.constexpr,
                   GIVEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One sequence, value head and tile of value channels, from its first segment to its last, or back (REVERSE).

    flows [F, HV, K, V + K] are [H | P] ([F, HV, K, V], H, if not TIED), sources the H in whose direction it goes.  The
    first of them, in that direction, holds what the given state becomes already: no P is needed there.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % HV
    sequence = (tl.program_id(0) // tiles // HV).to(tl.int64)
    begin = tl.load(first + sequence)
    count = tl.load(first + sequence + 1) - begin
    row = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    inside = (row < K)[:, None] & (column < V)[None, :]
    if GIVEN:
        whole_state = ((sequence * HV + head) * K + row[:, None]) * V + column[None, :]
        state = tl.load(given + whole_state, mask=inside, other=0.0)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    WIDTH: tl.constexpr = V + K if TIED else V
    SOURCE: tl.constexpr = V if REVERSE else WIDTH
    for step in range(count):
        segment = begin + (count - 1 - step if REVERSE else step)
        result = results + (segment.to(tl.int64) * HV + head) * K * V
        tl.store(result + row[:, None] * V + column[None, :], state, mask=inside)
        if step + 1 < count:
            # of a sequence's flows the leading begin with its first segment, the trailing with its second
            flow = ((segment - sequence) * HV + head) * K
            source = ((segment - sequence - (1 if REVERSE else 0)) * HV + head) * K * SOURCE
            following = tl.load(sources + source + row[:, None] * SOURCE + column[None, :], mask=inside, other=0.0)
            if step > 0:
                if TIED:
                    if STEP < BK:
                        tl.debug_barrier()  # the state was stored by other threads than those that read it now
                    for part in tl.static_range(0, K, STEP):
                        along = part + tl.arange(0, STEP)
                        if REVERSE:
                            place = (flow + along[None, :]) * WIDTH + V + row[:, None]
                        else:
                            place = (flow + row[:, None]) * WIDTH + V + along[None, :]
                        p = tl.load(flows + place, mask=(row < K)[:, None] & (along < K)[None, :], other=0.0)
                        if STEP < BK:
                            s = tl.load(result + along[:, None] * V + column[None, :],
                                        mask=(along < K)[:, None] & (column < V)[None, :], other=0.0)  # fmt: skip
                        else:
                            s = state
                        following = tl.dot(p, s, following, input_precision=PRECISION)
                else:
                    chunk = tl.load(offsets + segment)
                    end = tl.load(offsets + segment + 1)
                    decay = 1.0
                    while chunk < end:
                        index = chunk + tl.arange(0, CHUNKS)
                        factors = tl.load(total + index.to(tl.int64) * HV + head, mask=index < end, other=1.0)
                        decay *= tl.reduce(factors, 0, multiply)
                        chunk += CHUNKS
                    following += state * decay
            state = following


def entry_states(flows: Tensor, total: Tensor, segments: Segments, initial_state: Tensor | None, *, tied: bool,
                 into: Tensor) -> None:  # fmt: skip
    """The state at each segment's entry, [S, HV, K, V], from the flows of the leading segments (``flow_scan``)."""
    _compose(initial_state, flows, flows, total, segments, into, tied, False)


def exit_gradients(flows: Tensor, sources: Tensor, total: Tensor, segments: Segments, d_final_state: Tensor | None, *,
                   tied: bool, into: Tensor) -> None:  # fmt: skip
    """The gradient of the state at each segment's exit, [S, HV, K, V], from the forward's flows and what the trailing
    segments add (``reverse_flow_scan``)."""
    _compose(d_final_state, flows, sources, total, segments, into, tied, True)


def _compose(given, flows, sources, total, segments, results, tied, reverse) -> None:
    _, value_heads, key_dim, value_dim = results.shape
    width = max(16, triton.next_power_of_2(key_dim))
    launch = bind(
        compose_kernel, HV=value_heads, K=key_dim, V=value_dim, BK=width, BV=16,
        STEP=width if width <= 128 else 64, CHUNKS=64, TIED=tied, REVERSE=reverse,
        GIVEN=given is not None, PRECISION=float32_precision(total.device),
        num_warps=8 if width >= 128 else 4)  # fmt: skip
    launch(
        segments.sequences * value_heads * triton.cdiv(value_dim, 16),
        given, flows, sources, total, results, segments.first, segments.layout.offsets, segments.sequences)  # fmt: skip
