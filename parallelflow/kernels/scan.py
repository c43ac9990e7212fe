"""The scans: the only stages that pass the state from chunk to chunk.

One program carries the state of one sequence, value head and tile of value channels, transposed, S^T [BV, K], so that
each product of the chain takes its left operand from registers.  Per chunk, with the arrays of `prepare`:

    forward   R = inverse (V - from_start K S),   O = scale from_start Q S + scores R,   S <- total S + (to_end K)^T R
    reverse   Z = scores^T dO + to_end K dS,      W = inverse^T Z = dV,
              dS <- total dS + (scale from_start Q)^T dO - (from_start K)^T W

Rows that only write have no inverse: R = V, dV = Z, and the last term is absent.

The flows of segments (``segments.py``) come from the same kernels: H is the final state from zero, P that from the
identity without values, K more value channels; the reverse needs no second P, its flow is the transpose.
"""

import triton
import triton.language as tl
from torch import Tensor

from .chunks import locate_window
from .launch import bind
from .products import float32_precision, product, shared_memory
from .scans import Scans


@triton.jit(do_not_specialize=["time", "tokens", "per_sequence", "halt"])
def forward_kernel(query, key, value, inverse, scores, from_start, to_end, total, initial_state,
                   output, innovation, entry_states, final_state, halts, cu_seqlens, offsets, flows,
                   time, tokens, per_sequence, halt, scale,
                   H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                   C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, TIED: tl.constexpr,
                   READ: tl.constexpr, SAVE: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
                   FLOW: tl.constexpr, HALT: tl.constexpr, OWNED: tl.constexpr, PRECISION: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """From the first chunk to the last.  READ: write the outputs.  SAVE: write R and the chunks' entry states.
    HALT: the state at the entry of every chunk whose number in its sequence ``halt`` divides goes to ``halts``.

    FLOW: the final states are [H | P] of the segments in ``flows``, but where a sequence begins it is what its initial
    state becomes, without P.  OWNED: only segments that end a sequence, which ``flows`` then names, store its state.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    all_tiles: tl.constexpr = tiles + ((K + BV - 1) // BV if FLOW and TIED else 0)
    tile = tl.program_id(0) % all_tiles
    value_head = (tl.program_id(0) // all_tiles) % HV
    sequence = tl.program_id(0) // all_tiles // HV
    number = sequence
    if FLOW:
        begun = tl.load(flows + 2 * number + 1)  # the sequence that begins here, else -1
        sequence = tl.load(flows + 2 * number)
    first, length, chunk, own = locate_window(sequence, cu_seqlens, offsets, time, tokens, per_sequence, C, PACKED)
    row = tl.arange(0, C)
    k_column = tl.arange(0, BK)
    v_column = tile * BV + tl.arange(0, BV)
    k_inside = (k_column < K)[None, :]
    v_inside = (v_column < V)[None, :]
    k_offset = row[:, None] * (H * K) + k_column[None, :]
    v_offset = row[:, None] * (HV * V) + v_column[None, :]
    square = row[:, None] * C + row[None, :]
    head_key = (first * H + value_head // (HV // H)) * K
    head_value = (first * HV + value_head) * V
    flat = chunk.to(tl.int64) * HV + value_head
    own_flat = own.to(tl.int64) * HV + value_head
    across = k_column[None, :] * V + v_column[:, None]  # the state in memory is [K, V]
    state_inside = k_inside & (v_column < V)[:, None]
    if FLOW:
        state = tl.zeros([BV, BK], tl.float32)
        if HAS_INITIAL:
            whole_state = (tl.maximum(begun, 0).to(tl.int64) * HV + value_head) * K * V
            state = tl.load(initial_state + whole_state + across, mask=state_inside & (begun >= 0), other=0.0)
        if TIED:
            unit_row = (tile - tiles) * BV + tl.arange(0, BV)
            state = tl.where(tile >= tiles, tl.where(unit_row[:, None] == k_column[None, :], 1.0, 0.0), state)
            length = tl.where((tile >= tiles) & (begun >= 0), 0, length)
    elif HAS_INITIAL:
        whole_state = (sequence.to(tl.int64) * HV + value_head) * K * V
        state = tl.load(initial_state + whole_state + across, mask=state_inside, other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    dtype: tl.constexpr = key.dtype.element_ty
    for step in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        valid = (row < length - step * C)[:, None]
        k = tl.load(key + head_key + k_offset, mask=valid & k_inside, other=0.0)
        v = tl.load(value + head_value + v_offset, mask=valid & v_inside, other=0.0)
        entering = state.to(dtype)
        if HALT:  # noqa: SIM102 - settled while compiling
            if step % halt == 0:
                place = (step // halt) * (tl.num_programs(0) // all_tiles) + sequence * HV + value_head
                tl.store(halts + place.to(tl.int64) * K * V + across, state, mask=state_inside)
        if SAVE:
            saved = v_column[:, None] * K + k_column[None, :]
            tl.store(entry_states + own_flat * K * V + saved, entering, mask=state_inside)
        decay = tl.load(from_start + flat * C + row)
        if TIED:
            solve = tl.load(inverse + flat * C * C + square)
            known = tl.dot(entering, tl.trans(k), input_precision=PRECISION)
            r = product(tl.trans(v).to(tl.float32) - known * decay[None, :], tl.trans(solve), PRECISION)
            r_rounded = r.to(dtype)
            if SAVE:
                tl.store(innovation + head_value + v_offset, tl.trans(r_rounded), mask=valid & v_inside)
        else:
            r_rounded = tl.trans(v)
            r = r_rounded.to(tl.float32)
        if READ:
            q = tl.load(query + head_key + k_offset, mask=valid & k_inside, other=0.0)
            p = tl.load(scores + flat * C * C + square)
            o = tl.dot(entering, tl.trans(q), input_precision=PRECISION) * (decay * scale)[None, :]
            o += tl.dot(r_rounded, tl.trans(p), input_precision=PRECISION)
            tl.store(output + head_value + v_offset, tl.trans(o.to(dtype)), mask=valid & v_inside)
        weight = tl.load(to_end + flat * C + row)
        state = state * tl.load(total + flat) + product(r * weight[None, :], k, PRECISION)
        head_key += C * H * K
        head_value += C * HV * V
        flat += HV
        own_flat += HV
    if FLOW:
        width: tl.constexpr = V + (K if TIED else 0)
        channel = v_column
        channel_inside = v_column < V
        if TIED:
            channel = tl.where(tile >= tiles, V + unit_row, channel)
            channel_inside = tl.where(tile >= tiles, unit_row < K, channel_inside)
        flow = final_state + (number.to(tl.int64) * HV + value_head) * K * width
        tl.store(flow + k_column[None, :] * width + channel[:, None], state, mask=k_inside & channel_inside[:, None])
    elif HAS_FINAL:
        owner = tl.load(flows + number) if OWNED else number
        whole_state = (tl.maximum(owner, 0).to(tl.int64) * HV + value_head) * K * V
        tl.store(final_state + whole_state + across, state, mask=state_inside & (owner >= 0))


@triton.jit(do_not_specialize=["time", "tokens", "per_sequence"])
def reverse_kernel(query, key, d_output, inverse, scores, from_start, to_end, total, d_final_state,
                   d_value, exit_gradients, d_initial_state, cu_seqlens, offsets, flows,
                   time, tokens, per_sequence, scale,
                   H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                   C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, TIED: tl.constexpr,
                   HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr, FLOW: tl.constexpr,
                   OWNED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """From the last chunk to the first: the gradients of the states at the chunks' exits, and of the values.

    FLOW: only what leaves the segments in ``flows``, from zero, or, where a sequence ends, from its final gradient.
    OWNED: only segments that begin a sequence, which ``flows`` then names, store its initial gradient.
    """
    tiles = tl.cdiv(V, BV)
    tile = tl.program_id(0) % tiles
    value_head = (tl.program_id(0) // tiles) % HV
    sequence = tl.program_id(0) // tiles // HV
    number = sequence
    ended = sequence
    if FLOW:
        ended = tl.load(flows + 2 * number + 1)  # the sequence that ends here, else -1
        sequence = tl.load(flows + 2 * number)
    first, length, chunk, own = locate_window(sequence, cu_seqlens, offsets, time, tokens, per_sequence, C, PACKED)
    row = tl.arange(0, C)
    k_column = tl.arange(0, BK)
    v_column = tile * BV + tl.arange(0, BV)
    k_inside = (k_column < K)[None, :]
    v_inside = (v_column < V)[None, :]
    k_offset = row[:, None] * (H * K) + k_column[None, :]
    v_offset = row[:, None] * (HV * V) + v_column[None, :]
    square = row[:, None] * C + row[None, :]
    steps = tl.cdiv(length, C)
    last = tl.maximum(steps - 1, 0)
    head_key = ((first + last * C) * H + value_head // (HV // H)) * K
    head_value = ((first + last * C) * HV + value_head) * V
    flat = (chunk + last).to(tl.int64) * HV + value_head
    own_flat = (own + last).to(tl.int64) * HV + value_head
    across = k_column[None, :] * V + v_column[:, None]
    state_inside = k_inside & (v_column < V)[:, None]
    if HAS_FINAL:
        whole_state = (tl.maximum(ended, 0).to(tl.int64) * HV + value_head) * K * V
        state = tl.load(d_final_state + whole_state + across, mask=state_inside & (ended >= 0), other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    dtype: tl.constexpr = key.dtype.element_ty
    for step in tl.range(0, steps, num_stages=STAGES):
        valid = (row < length - (last - step) * C)[:, None]
        k = tl.load(key + head_key + k_offset, mask=valid & k_inside, other=0.0)
        do = tl.load(d_output + head_value + v_offset, mask=valid & v_inside, other=0.0)
        p = tl.load(scores + flat * C * C + square)
        q = tl.load(query + head_key + k_offset, mask=valid & k_inside, other=0.0)
        leaving = state.to(dtype)
        if not FLOW:
            saved = v_column[:, None] * K + k_column[None, :]
            tl.store(exit_gradients + own_flat * K * V + saved, leaving, mask=state_inside)
        weight = tl.load(to_end + flat * C + row)
        decay = tl.load(from_start + flat * C + row)
        do = tl.trans(do)
        z = tl.dot(leaving, tl.trans(k), input_precision=PRECISION) * weight[None, :]
        z += tl.dot(do, p, input_precision=PRECISION)
        state *= tl.load(total + flat)
        if TIED:
            solve = tl.load(inverse + flat * C * C + square)
            z = product(z, solve, PRECISION)
            state -= product(z * decay[None, :], k, PRECISION)
        if not FLOW:
            tl.store(d_value + head_value + v_offset, tl.trans(z.to(dtype)), mask=valid & v_inside)
        state += product(do.to(tl.float32) * (decay * scale)[None, :], q, PRECISION)
        head_key -= C * H * K
        head_value -= C * HV * V
        flat -= HV
        own_flat -= HV
    if HAS_INITIAL:
        owner = tl.load(flows + number) if OWNED else number
        whole_state = (tl.maximum(owner, 0).to(tl.int64) * HV + value_head) * K * V
        tl.store(d_initial_state + whole_state + across, state, mask=state_inside & (owner >= 0))


def configuration(key: Tensor, value: Tensor, tied: bool) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages of the scans; they depend on head sizes, dtype, ties and card alone."""
    width = max(16, triton.next_power_of_2(key.shape[-1]))
    row = width * key.element_size()
    tile = 64 if row <= 512 else 32 if row <= 1024 else 16
    tile = min(tile, max(16, triton.next_power_of_2(value.shape[-1])))
    if key.element_size() > 2 or row > 512 or shared_memory(key.device) < 160_000:
        stages = 1
    else:
        stages = 2 if tied or row > 256 else 3
    return {"BK": width, "BV": tile, "STAGES": stages, "num_warps": 8 if width > 128 and tile == 64 else 4,
            "num_stages": stages}  # fmt: skip


def tiles(key: Tensor, value: Tensor, tied: bool) -> int:
    """Programs that carry one value head's state."""
    return triton.cdiv(value.shape[3], configuration(key, value, tied)["BV"])


def _sizes(key: Tensor, value: Tensor) -> dict[str, int]:
    return {"H": key.shape[2], "HV": value.shape[2], "K": key.shape[3], "V": value.shape[3]}


def launch_forward(key, value, prepared, chunks, initial_state, final_state, *, query=None, scale=1.0, output=None,
             innovation=None, entry_states=None, flows=None, owners=None, halts=None, halt=1):  # fmt: skip
    tied = prepared.inverse is not None
    options = configuration(key, value, tied)
    sizes = _sizes(key, value)
    programs = chunks.sequences * tiles(key, value, tied)
    if flows is not None:
        programs = len(flows) * (tiles(key, value, tied) + tied * triton.cdiv(sizes["K"], options["BV"]))
    launch = bind(
        forward_kernel, **sizes, C=chunks.size, PACKED=chunks.packed, TIED=tied,
        READ=output is not None, SAVE=entry_states is not None, HAS_INITIAL=initial_state is not None,
        HAS_FINAL=final_state is not None, FLOW=flows is not None, HALT=halts is not None, OWNED=owners is not None,
        PRECISION=float32_precision(key.device), **options)  # fmt: skip
    launch(
        programs * sizes["HV"],
        query, key, value, prepared.inverse, prepared.scores, prepared.from_start, prepared.to_end, prepared.total,
        initial_state, output, innovation, entry_states, final_state, halts, chunks.cu_seqlens, chunks.offsets,
        owners if flows is None else flows,
        chunks.time, chunks.length, chunks.per_sequence, halt, scale)  # fmt: skip


def launch_reverse(query, key, d_output, prepared, chunks, scale, d_final_state, d_initial_state, *, d_value=None,
             exit_gradients=None, flows=None, owners=None):  # fmt: skip
    tied = prepared.inverse is not None
    launch = bind(
        reverse_kernel, **_sizes(key, d_output), C=chunks.size, PACKED=chunks.packed, TIED=tied,
        HAS_FINAL=d_final_state is not None, HAS_INITIAL=d_initial_state is not None, FLOW=flows is not None,
        OWNED=owners is not None, PRECISION=float32_precision(key.device),
        **configuration(key, d_output, tied))  # fmt: skip
    sequences = chunks.sequences if flows is None else len(flows)
    launch(
        sequences * d_output.shape[2] * tiles(key, d_output, tied),
        query, key, d_output, prepared.inverse, prepared.scores, prepared.from_start, prepared.to_end, prepared.total,
        d_final_state, d_value, exit_gradients, d_initial_state, chunks.cu_seqlens, chunks.offsets,
        owners if flows is None else flows,
        chunks.time, chunks.length, chunks.per_sequence, scale)  # fmt: skip


SCANS = Scans(tiles, launch_forward, launch_reverse)
