"""Gradients of query, key, beta and log-decay, for all chunks at once, from the states and their gradients.

Per chunk and value head, with S the state at the entry, E the gradient of the state at the exit (both transposed in
memory), R and W = dV from the scans, c the decay sums and D[t, s] = e^{c_t - c_s}:

    dA = (dO R^T) D beta_s scale (s <= t)          dB = -(W R^T) D beta_s (s < t)
    dQ = scale e^c dO S^T + dA K
    dK = beta e^{c_C - c} R E^T - e^c W S^T + dA^T Q + (dB + dB^T) K
    d(beta_s) = W_s . R_s / beta_s
              = (sum over t of q_t.k_s dA[t, s] + k_t.k_s dB[t, s]) / beta_s + e^{c_C - c_s} k_s . (R E^T)_s

The second form of d(beta) is taken for rows that only write, and where beta is 0 or too small to divide by (2^-40; 2^-6
in float16, whose W would underflow): there the division is left out by not multiplying beta in.  The first form is
taken elsewhere, because the terms of the second cancel when the keys are strongly correlated.  The decay sums get the
row sums less the column sums of the same two products, q_t . dQ and k_t . dK of the parts read from the entry state,
and, through c_C, the parts that reach the exit state; the log-decays get their suffix sums.

Three launches: `pairs_kernel` forms dA and dB, summed over the value heads of a key head (they share Q and K, so the
products with Q and K come once per key head); `states_kernel` adds what passes through the states; `sums_kernel`
finishes beta and the decay.  Every sum over heads or tiles has a fixed order inside one program.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arena import Arena
from .chunks import Chunks, locate_own_chunk
from .launch import bind
from .prepare import Prepared, decay_between
from .products import float32_precision, shared_memory


@triton.jit
def load_rows(base, row, valid, channel, heads: tl.constexpr, size: tl.constexpr):
    """Tokens `row` and channels `channel` of one head of [T, heads, size], 0 outside."""
    inside = valid[:, None] & (channel < size)[None, :]
    return tl.load(base + row[:, None] * (heads * size) + channel[None, :], mask=inside, other=0.0)


@triton.jit
def load_state(base, channel, column, K: tl.constexpr, V: tl.constexpr):
    """A tile of a transposed state [V, K], 0 outside."""
    inside = (channel < V)[:, None] & (column < K)[None, :]
    return tl.load(base + channel[:, None] * K + column[None, :], mask=inside, other=0.0)


@triton.jit
def gram(left, right, row, valid, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
         PRECISION: tl.constexpr):  # fmt: skip
    """left @ right^T of one head's rows, [C, C]."""
    total = tl.zeros([C, C], tl.float32)
    for start in tl.static_range(0, K, BK):
        column = start + tl.arange(0, BK)
        a = load_rows(left, row, valid, column, H, K)
        b = load_rows(right, row, valid, column, H, K)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["time", "tokens", "per_sequence"])
def pairs_kernel(query, key, beta, d_output, innovation, d_value, cumulative, d_pairs, down_sums, cross_sums, aligned,
                 table, time, tokens, per_sequence, scale,
                 H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                 C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, TIED: tl.constexpr,
                 HAS_BETA: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """dA and dB of one chunk and key head [2, C, C]; per value head their sums with the products they belong to."""
    own_chunk = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    first, length, chunk = locate_own_chunk(own_chunk, table, time, tokens, per_sequence, C, PACKED)
    row = tl.arange(0, C)
    valid = row < length
    head_key = (first * H + head) * K
    read = gram(query + head_key, key + head_key, row, valid, H, K, C, BK, PRECISION)
    da = tl.zeros([C, C], tl.float32)
    if TIED:
        own = gram(key + head_key, key + head_key, row, valid, H, K, C, BK, PRECISION)
        db = tl.zeros([C, C], tl.float32)
    causal = row[:, None] >= row[None, :]
    strict = row[:, None] > row[None, :]
    for j in range(HV // H):
        value_head = head * (HV // H) + j
        flat = own_chunk * HV + value_head
        head_value = (first * HV + value_head) * V
        weight = tl.where(valid, 1.0, 0.0)
        if HAS_BETA:
            place = (first + row) * HV + value_head
            weight = tl.load(beta + place, mask=valid, other=0.0).to(tl.float32)
        if HAS_DECAY:
            decays = cumulative + (chunk * HV + value_head) * 2 * C
            high = tl.load(decays + row)
            low = tl.load(decays + C + row)
        f = tl.zeros([C, C], tl.float32)
        n = tl.zeros([C, C], tl.float32)
        for part in tl.range(0, V, BV, num_stages=STAGES):
            channel = part + tl.arange(0, BV)
            do = load_rows(d_output + head_value, row, valid, channel, HV, V)
            r = load_rows(innovation + head_value, row, valid, channel, HV, V)
            f = tl.dot(do, tl.trans(r), f, input_precision=PRECISION)
            if TIED:
                w = load_rows(d_value + head_value, row, valid, channel, HV, V)
                n = tl.dot(w, tl.trans(r), n, input_precision=PRECISION)
        if HAS_DECAY:
            decay = decay_between(high[:, None], low[:, None], high[None, :], low[None, :], causal)
            f *= decay * scale
        else:
            f = tl.where(causal, f, 0.0) * scale
        da += f * weight[None, :]
        f *= read
        down = tl.sum(f, 0)
        cross = tl.sum(f * weight[None, :], 1)
        if TIED:
            tl.store(aligned + flat * C + row, tl.sum(tl.where(row[:, None] == row[None, :], n, 0.0), 1))
            n = tl.where(strict, n * decay if HAS_DECAY else n, 0.0)
            db -= n * weight[None, :]
            n *= own
            down -= tl.sum(n, 0)
            cross -= tl.sum(n * weight[None, :], 1)
        if HAS_BETA or HAS_DECAY:
            tl.store(down_sums + flat * C + row, down)
        if HAS_DECAY:
            tl.store(cross_sums + flat * C + row, cross - down * weight)
    square = (own_chunk * H + head) * 2 * C * C + row[:, None] * C + row[None, :]
    tl.store(d_pairs + square, da.to(d_pairs.dtype.element_ty))
    if TIED:
        tl.store(d_pairs + square + C * C, (db + tl.trans(db)).to(d_pairs.dtype.element_ty))


@triton.jit(do_not_specialize=["time", "tokens", "per_sequence", "count"])
def states_kernel(query, key, beta, d_output, innovation, d_value, entry_states, exit_gradients, cumulative, d_pairs,
                  d_query, d_key, entry_sums, exit_sums, overlaps, table, time, tokens, per_sequence, scale, count,
                  H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                  C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr,
                  TIED: tl.constexpr, HAS_BETA: tl.constexpr, HAS_DECAY: tl.constexpr,
                  PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dQ and dK of one chunk, key head and tile of key channels, and that tile's part of the vector sums."""
    tile = tl.program_id(0) % TILES
    own_chunk = (tl.program_id(0) // TILES // H).to(tl.int64)
    head = tl.program_id(0) // TILES % H
    first, length, chunk = locate_own_chunk(own_chunk, table, time, tokens, per_sequence, C, PACKED)
    row = tl.arange(0, C)
    valid = row < length
    column = tile * BK + tl.arange(0, BK)
    head_key = (first * H + head) * K
    # the pairs come first: a product that feeds another one would bind all the warps to the rows
    q_tile = load_rows(query + head_key, row, valid, column, H, K)
    k_tile = load_rows(key + head_key, row, valid, column, H, K)
    square = (own_chunk * H + head) * 2 * C * C + row[:, None] * C + row[None, :]
    da = tl.load(d_pairs + square)
    dq = tl.dot(da, k_tile, input_precision=PRECISION)
    dk = tl.dot(tl.trans(da), q_tile, input_precision=PRECISION)
    if TIED:
        dk += tl.dot(tl.load(d_pairs + square + C * C), k_tile, input_precision=PRECISION)
    for j in range(HV // H):
        value_head = head * (HV // H) + j
        flat = own_chunk * HV + value_head
        part_flat = tile.to(tl.int64) * count * HV + flat
        head_value = (first * HV + value_head) * V
        base = flat * K * V
        weight = tl.where(valid, 1.0, 0.0)
        if HAS_BETA:
            weight = tl.load(beta + (first + row) * HV + value_head, mask=valid, other=0.0).to(tl.float32)
        # small loads first, so that they wait together with the tiles
        k = load_rows(key + head_key, row, valid, column, H, K)
        if HAS_DECAY:
            q = load_rows(query + head_key, row, valid, column, H, K)
            decays = cumulative + (chunk * HV + value_head) * 2 * C
            high = tl.load(decays + row)
            low = tl.load(decays + C + row)
            end_high = tl.load(decays + C - 1)
            end_low = tl.load(decays + 2 * C - 1)
        q_entry = tl.zeros([C, BK], tl.float32)
        k_entry = tl.zeros([C, BK], tl.float32)
        k_exit = tl.zeros([C, BK], tl.float32)
        overlap = tl.zeros([BV], tl.float32)
        for part in tl.range(0, V, BV, num_stages=STAGES):
            channel = part + tl.arange(0, BV)
            state = load_state(entry_states + base, channel, column, K, V)
            do = load_rows(d_output + head_value, row, valid, channel, HV, V)
            q_entry = tl.dot(do, state, q_entry, input_precision=PRECISION)
            if TIED:
                w = load_rows(d_value + head_value, row, valid, channel, HV, V)
                k_entry = tl.dot(w, state, k_entry, input_precision=PRECISION)
            d_state = load_state(exit_gradients + base, channel, column, K, V)
            r = load_rows(innovation + head_value, row, valid, channel, HV, V)
            k_exit = tl.dot(r, d_state, k_exit, input_precision=PRECISION)
            if HAS_DECAY:
                overlap += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        if HAS_DECAY:
            from_start = tl.exp2(high)
            q_entry *= (from_start * scale)[:, None]
            k_exit *= tl.exp2((end_high - high) + (end_low - low))[:, None]
            entry_sum = tl.sum(q_entry * q.to(tl.float32), 1)
        else:
            q_entry *= scale
        if TIED:
            if HAS_DECAY:
                k_entry *= from_start[:, None]
                entry_sum -= tl.sum(k_entry * k.to(tl.float32), 1)
            dk -= k_entry
        if HAS_DECAY:
            tl.store(entry_sums + part_flat * C + row, entry_sum)
            tl.store(overlaps + part_flat, tl.sum(overlap, 0) * tl.exp2(end_high + end_low))
        if HAS_BETA or HAS_DECAY:
            tl.store(exit_sums + part_flat * C + row, tl.sum(k_exit * k.to(tl.float32), 1))
        dq += q_entry
        dk += k_exit * weight[:, None]
    offset = head_key + row[:, None] * (H * K) + column[None, :]
    inside = valid[:, None] & (column < K)[None, :]
    tl.store(d_query + offset, dq.to(d_query.dtype.element_ty), mask=inside)
    tl.store(d_key + offset, dk.to(d_key.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["time", "tokens", "per_sequence", "count"])
def sums_kernel(beta, down_sums, cross_sums, aligned, entry_sums, exit_sums, overlaps, d_beta, d_log_decay,
                table, time, tokens, per_sequence, count,
                HV: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr,
                TIED: tl.constexpr, HAS_BETA: tl.constexpr, HAS_DECAY: tl.constexpr,
                DIVISIBLE: tl.constexpr):  # fmt: skip
    """d(beta) and d(log_decay) of one chunk and a few value heads."""
    groups: tl.constexpr = (HV + HEADS - 1) // HEADS
    own_chunk = (tl.program_id(0) // groups).to(tl.int64)
    first, length, _ = locate_own_chunk(own_chunk, table, time, tokens, per_sequence, C, PACKED)
    head = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    row = tl.arange(0, C)
    present = head < HV
    flat = own_chunk * HV + head
    vector = flat[:, None] * C + row[None, :]
    inside = present[:, None] & (row < length)[None, :]
    place = (first + row)[None, :] * HV + head[:, None]
    entries = count.to(tl.int64) * HV
    exits = tl.zeros([HEADS, C], tl.float32)
    for tile in tl.static_range(TILES):
        exits += tl.load(exit_sums + tile * entries * C + vector, mask=inside, other=0.0)
    weight = tl.where(inside, 1.0, 0.0)
    if HAS_BETA:
        weight = tl.load(beta + place, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(down_sums + vector, mask=inside, other=0.0) + exits
        if TIED:
            divisible = tl.abs(weight) > DIVISIBLE
            exact = tl.load(aligned + vector, mask=inside, other=0.0) / tl.where(divisible, weight, 1.0)
            slope = tl.where(divisible, exact, slope)
        tl.store(d_beta + place, slope.to(d_beta.dtype.element_ty), mask=inside)
    if HAS_DECAY:
        d_sum = tl.load(cross_sums + vector, mask=inside, other=0.0)
        whole = tl.zeros([HEADS], tl.float32)
        for tile in tl.static_range(TILES):
            d_sum += tl.load(entry_sums + tile * entries * C + vector, mask=inside, other=0.0)
            whole += tl.load(overlaps + tile * entries + flat, mask=present, other=0.0)
        exits *= weight
        before = tl.cumsum(exits, 1) - exits
        d_decay = tl.cumsum(d_sum, 1, reverse=True) + before + whole[:, None]
        tl.store(d_log_decay + place, d_decay.to(d_log_decay.dtype.element_ty), mask=inside)


def configuration(key: Tensor, value: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes, warps and stages of `pairs_kernel` and `states_kernel`, from heads, their sizes, dtype and card."""
    group = value.shape[2] // key.shape[2]
    k, v = (max(16, triton.next_power_of_2(x.shape[-1])) for x in (key, value))
    full = key.element_size() > 2
    stages = 1 if full or shared_memory(key.device) < 160_000 else 3
    pairs = {"BK": min(k, 32 if full else 128), "BV": min(v, 32), "STAGES": stages, "num_stages": stages,
             "num_warps": 4}  # fmt: skip
    # With two warps the products take no descriptors: of 32 channels ptxas 12.8 gets those wrong (an address from
    # registers that nobody wrote; docs/performance/prepare.md).
    states = {"BK": min(k, 32 if full else 64), "BV": min(v, 32 if full or group == 1 else 64), "STAGES": stages,
              "num_stages": stages, "num_warps": 2 if k <= 32 else 4}  # fmt: skip
    return pairs, states


class Gradients(NamedTuple):
    """Of query, key, beta and log_decay; None where the input is None."""

    query: Tensor
    key: Tensor
    beta: Tensor | None
    log_decay: Tensor | None


class Sums(NamedTuple):
    """What the three launches hand on."""

    d_pairs: Tensor
    down: Tensor
    cross: Tensor
    aligned: Tensor
    entry: Tensor
    exit: Tensor
    overlaps: Tensor


def vacant_sums(arena: Arena, query: Tensor, value: Tensor, count: int, chunk_size: int) -> Sums:
    """Uninitialised arrays that `gradient` needs for `count` chunks."""
    heads, k = query.shape[2:]
    value_heads, c = value.shape[2], chunk_size
    tiles = triton.cdiv(k, configuration(query, value)[1]["BK"])
    d_pairs = arena.empty(count, heads, 2, c, c, dtype=query.dtype)
    down, cross, aligned = (arena.empty(count, value_heads, c, dtype=torch.float32) for _ in range(3))
    entry, exit = (arena.empty(tiles, count, value_heads, c, dtype=torch.float32) for _ in range(2))
    return Sums(d_pairs, down, cross, aligned, entry, exit, arena.empty(tiles, count, value_heads, dtype=torch.float32))


def may_overwrite(query: Tensor, value: Tensor) -> bool:
    """Whether R may lie where the gradient of the query goes: no, several programs read a chunk's R."""
    return False


def gradient(query: Tensor, key: Tensor, beta: Tensor | None, log_decay: Tensor | None, d_output: Tensor,
             innovation: Tensor, d_value: Tensor, entry_states: Tensor, exit_gradients: Tensor, prepared: Prepared,
             chunks: Chunks, *, scale: float, sums: Sums, into: Gradients) -> None:  # fmt: skip
    """Gradients of query, key [B, T, H, K], beta and log_decay [B, T, HV], each in its input's dtype, in the tensors of
    `into`; `sums` are `vacant_sums`."""
    heads, k = key.shape[2:]
    value_heads, v = d_output.shape[2:]
    m, c = chunks.count, chunks.size
    tied, has_beta, has_decay = prepared.inverse is not None, beta is not None, log_decay is not None
    d_query, d_key, d_beta, d_log_decay = into
    if m == 0:
        return
    pairs_options, states_options = configuration(key, d_output)
    tiles = triton.cdiv(k, states_options["BK"])
    batch = chunks.table, chunks.time, chunks.length, chunks.per_sequence
    flags = {"HV": value_heads, "C": c, "PACKED": chunks.packed, "TIED": tied, "HAS_BETA": has_beta,
             "HAS_DECAY": has_decay}  # fmt: skip
    sizes = {"H": heads, "K": k, "V": v, "PRECISION": float32_precision(key.device)}
    bind(pairs_kernel, **pairs_options, **sizes, **flags)(
        m * heads, query, key, beta, d_output, innovation, d_value, prepared.cumulative, sums.d_pairs, sums.down,
        sums.cross, sums.aligned, *batch, scale)  # fmt: skip
    bind(states_kernel, TILES=tiles, **states_options, **sizes, **flags)(
        m * heads * tiles, query, key, beta, d_output, innovation, d_value, entry_states, exit_gradients,
        prepared.cumulative, sums.d_pairs, d_query, d_key, sums.entry, sums.exit, sums.overlaps, *batch, scale,
        m)  # fmt: skip
    if has_beta or has_decay:
        few = min(8, triton.next_power_of_2(value_heads))
        smallest = 2.0**-6 if key.dtype == torch.float16 else 2.0**-40
        bind(sums_kernel, HEADS=few, TILES=tiles, DIVISIBLE=smallest, num_warps=4, **flags)(
            m * triton.cdiv(value_heads, few), beta, sums.down, sums.cross, sums.aligned, sums.entry, sums.exit,
            sums.overlaps, d_beta, d_log_decay, *batch, m)  # fmt: skip
