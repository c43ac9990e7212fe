"""Gradients of query, key, beta and log-decay, for all chunks at once, from the states and their gradients.

Per chunk and value head, with S the state at the entry, dS its gradient at the exit (both transposed in memory), R and
W = dV from the scans, c the decay sums, D[t, s] = e^{c_t - c_s} and w = beta e^{c_C - c}:

    F = dO R^T        dA = F D beta_s scale (s <= t)        dB = -(W R^T) D beta_s (s < t)
    dQ = scale e^c dO S^T + dA K
    dK = w R dS^T - e^c W S^T + dA^T Q + (dB + dB^T) K
    d(beta_s) = W_s . R_s / beta_s
              = (sum over t of q_t.k_s dA[t, s] + k_t.k_s dB[t, s]) / beta_s + e^{c_C - c_s} k_s . (R dS^T)_s

The second form is taken for rows that only write, and where beta is 0 or too small to divide by (2^-40; 2^-6 in float16,
whose W would underflow): there the division is left out by not multiplying beta in.  The first form is taken elsewhere,
because the terms of the second cancel when the keys are strongly correlated.  The decay sums get
the row sums less the column sums of the same two products, q_t . dQ and k_t . dK of the parts read from the entry
state, and, through c_C, the parts that reach the exit state; the log-decays get their suffix sums.
Value heads that share a key head are summed in a fixed order inside one program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import Chunks, locate_chunk
from .prepare import Prepared, decay_between
from .products import float32_precision


@triton.jit
def load_rows(upper, lower, row, second, valid, channel, heads: tl.constexpr, size: tl.constexpr):
    """Tokens `row` and channels `channel` of one head of [T, heads, size]: of `lower` where `second`, else of `upper`."""
    base = tl.where(second, lower, upper)
    offset = row[:, None] * (heads * size) + channel[None, :]
    return tl.load(base[:, None] + offset, mask=valid[:, None] & (channel < size)[None, :], other=0.0)


@triton.jit
def load_state(base, channel, column, K: tl.constexpr, V: tl.constexpr):
    """A tile of a transposed state [V, K], 0 outside."""
    inside = (channel < V)[:, None] & (column < K)[None, :]
    return tl.load(base + channel[:, None] * K + column[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["time", "per_sequence"])
def gradient_kernel(query, key, beta, d_output, innovation, d_value, entry_states, exit_gradients, cumulative,
                    d_query, d_key, d_beta, d_log_decay, table, time, per_sequence, scale, tokens,
                    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
                    PACKED: tl.constexpr, TIED: tl.constexpr, HAS_BETA: tl.constexpr, HAS_DECAY: tl.constexpr,
                    DIVISIBLE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One chunk, key head and tile of key channels; beta's and the decay's gradients are partial sums over the tiles.

    The queries' side and the reads' side are alike, so tied rows stack them: [Q; K], [dO; W], [dQ; the reads' dK] with 2C
    rows.  The writes' dK is kept transposed, [BK, C].  Both fill eight warps of the tensor cores.
    """
    chunk = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    tile = tl.program_id(1)
    first, length = locate_chunk(chunk, table, time, per_sequence, C, PACKED)
    token = tl.arange(0, C)
    valid = token < length
    S: tl.constexpr = 2 if TIED else 1
    row = tl.arange(0, S * C) % C
    second = tl.arange(0, S * C) >= C
    row_valid = row < length
    keep = tl.where(second, row - 1, row)[:, None] >= token[None, :]  # s <= t for the queries, s < t for the reads
    column = tile * BK + tl.arange(0, BK)
    head_key = (first * H + head) * K
    alone = token >= C
    k = load_rows(key + head_key, key + head_key, token, alone, valid, column, H, K)
    qk = load_rows(query + head_key, key + head_key, row, second, row_valid, column, H, K)
    if TILES == 1:
        gram = tl.dot(qk, tl.trans(k), input_precision=PRECISION)
    else:
        gram = tl.zeros([S * C, C], tl.float32)
        for start in range(0, K, BK):
            part = start + tl.arange(0, BK)
            k_part = load_rows(key + head_key, key + head_key, token, alone, valid, part, H, K)
            qk_part = load_rows(query + head_key, key + head_key, row, second, row_valid, part, H, K)
            gram = tl.dot(qk_part, tl.trans(k_part), gram, input_precision=PRECISION)
    dtype: tl.constexpr = key.dtype.element_ty
    side = tl.where(second, -1.0, scale)
    d_reads = tl.zeros([S * C, BK], tl.float32)
    d_writes = tl.zeros([BK, C], tl.float32)
    for j in tl.range(0, HV // H, num_stages=STAGES):
        value_head = head * (HV // H) + j
        flat = chunk * HV + value_head
        place = (first + token) * HV + value_head
        head_value = (first * HV + value_head) * V
        state_base = flat * K * V
        weight = tl.where(valid, 1.0, 0.0)
        if HAS_BETA:
            weight = tl.load(beta + place, mask=valid, other=0.0).to(tl.float32)
        if HAS_DECAY:
            sums = cumulative + flat * 2 * C
            high = tl.load(sums + token)
            low = tl.load(sums + C + token)
            row_high = tl.load(sums + row)
            row_low = tl.load(sums + C + row)
            end_high = tl.load(sums + C - 1)
            end_low = tl.load(sums + 2 * C - 1)
            row_scale = tl.exp2(row_high) * side
        else:
            row_scale = side
        # what the state at the entry gives the queries and the reads
        entry = tl.zeros([S * C, BK], tl.float32)
        overlap = 0.0
        for part in tl.static_range(PARTS):
            channel = part * BV + tl.arange(0, BV)
            d_state = load_state(exit_gradients + state_base, channel, column, K, V)
            state = load_state(entry_states + state_base, channel, column, K, V)
            dow = load_rows(d_output + head_value, d_value + head_value, row, second, row_valid, channel, HV, V)
            r = load_rows(innovation + head_value, innovation + head_value, token, alone, valid, channel, HV, V)
            if HAS_DECAY:
                overlap += tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1), 0)
            entry = tl.dot(dow, state, entry, input_precision=PRECISION)
        entry *= row_scale[:, None]
        if HAS_DECAY:  # read again: held over the loop it would cost a third of the registers
            again = load_rows(query + head_key, key + head_key, row, second, row_valid, column, H, K)
            row_sum = tl.sum(entry * again.to(tl.float32), 1)
        d_reads += entry
        # what reaches the state at the exit
        to_exit = tl.zeros([BK, C], tl.float32)
        for part in tl.static_range(PARTS):
            if PARTS > 1:
                channel = part * BV + tl.arange(0, BV)
                d_state = load_state(exit_gradients + state_base, channel, column, K, V)
                r = load_rows(innovation + head_value, innovation + head_value, token, alone, valid, channel, HV, V)
            to_exit = tl.dot(tl.trans(d_state), tl.trans(r), to_exit, input_precision=PRECISION)
        if HAS_DECAY:
            to_exit *= tl.exp2((end_high - high) + (end_low - low))[None, :]
        again = load_rows(key + head_key, key + head_key, token, alone, valid, column, H, K)
        exits = tl.sum(to_exit * tl.trans(again).to(tl.float32), 0)
        d_writes += to_exit * weight[None, :]
        # what stays inside the chunk
        pairs = tl.zeros([S * C, C], tl.float32)
        for part in tl.static_range(PARTS):
            if PARTS > 1:
                channel = part * BV + tl.arange(0, BV)
                dow = load_rows(d_output + head_value, d_value + head_value, row, second, row_valid, channel, HV, V)
                r = load_rows(innovation + head_value, innovation + head_value, token, alone, valid, channel, HV, V)
            pairs = tl.dot(dow, tl.trans(r), pairs, input_precision=PRECISION)
        if TIED:
            aligned = tl.sum(tl.where(second[:, None] & (row[:, None] == token[None, :]), pairs, 0.0), 0)
        if HAS_DECAY:
            decay = decay_between(row_high[:, None], row_low[:, None], high[None, :], low[None, :], keep)
            pairs *= decay * side[:, None]
        else:
            pairs = tl.where(keep, pairs, 0.0) * side[:, None]
        d_gram = (pairs * weight[None, :]).to(dtype)
        d_reads = tl.dot(d_gram, k, d_reads, input_precision=PRECISION)
        d_writes = tl.dot(tl.trans(qk), d_gram, d_writes, input_precision=PRECISION)
        pairs *= gram
        if TILES > 1:
            pairs = tl.where(tile == 0, pairs, 0.0)
        down = tl.sum(pairs, 0)
        slot = tile.to(tl.int64) * tokens + place
        if HAS_BETA:
            slope = down + exits
            if TIED:
                divisible = tl.abs(weight) > DIVISIBLE
                exact = tl.where(tile == 0, aligned / tl.where(divisible, weight, 1.0), 0.0)
                slope = tl.where(divisible, exact, slope)
            tl.store(d_beta + slot, slope.to(d_beta.dtype.element_ty), mask=valid)
        if HAS_DECAY:
            row_sum += tl.sum(pairs * weight[None, :], 1)
            d_sum = tl.sum(tl.reshape(row_sum, [S, C]), 0) - down * weight
            exits *= weight
            whole = tl.exp2(end_high + end_low) * overlap
            d_decay = tl.cumsum(d_sum, 0, reverse=True) + (tl.cumsum(exits, 0) - exits) + whole
            tl.store(d_log_decay + slot, d_decay.to(d_log_decay.dtype.element_ty), mask=valid)
    offset = head_key + token[:, None] * (H * K) + column[None, :]
    inside = valid[:, None] & (column < K)[None, :]
    dk = tl.trans(d_writes)
    if TIED:
        dq, dk_reads = tl.split(tl.permute(tl.reshape(d_reads, [2, C, BK]), (1, 2, 0)))
        dk += dk_reads
    else:
        dq = d_reads
    tl.store(d_query + offset, dq.to(dtype), mask=inside)
    tl.store(d_key + offset, dk.to(dtype), mask=inside)


def gradient(query: Tensor, key: Tensor, beta: Tensor | None, log_decay: Tensor | None, d_output: Tensor,
             innovation: Tensor, d_value: Tensor, entry_states: Tensor, exit_gradients: Tensor, prepared: Prepared,
             chunks: Chunks, *, scale: float) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key [B, T, H, K], beta and log_decay [B, T, HV], each in its input's dtype."""
    heads, k = key.shape[2:]
    value_heads, v = d_output.shape[2:]
    full = key.dtype == torch.float32
    width = max(16, min(triton.next_power_of_2(k), 64 if full else 128))
    tile = max(16, min(triton.next_power_of_2(v), 32 if full else 128))
    tiles = triton.cdiv(k, width)
    d_query, d_key = torch.empty_like(query), torch.empty_like(key)

    def partial(like: Tensor | None) -> Tensor | None:
        if like is None or tiles == 1:
            return None if like is None else torch.empty_like(like)
        return torch.empty(tiles, *like.shape, device=like.device, dtype=torch.float32)

    d_beta, d_log_decay = partial(beta), partial(log_decay)
    if chunks.count:
        gradient_kernel[(chunks.count * heads, tiles)](
            query, key, beta, d_output, innovation, d_value, entry_states, exit_gradients, prepared.cumulative,
            d_query, d_key, d_beta, d_log_decay, chunks.table, chunks.time, chunks.per_sequence, scale,
            d_output.numel() // v, H=heads, HV=value_heads, K=k, V=v, C=chunks.size, BK=width, BV=tile, PARTS=triton.cdiv(v, tile), TILES=tiles, PACKED=chunks.packed, TIED=prepared.inverse is not None,
            HAS_BETA=beta is not None, HAS_DECAY=log_decay is not None, PRECISION=float32_precision(key.device),
            DIVISIBLE=2.0**-6 if key.dtype == torch.float16 else 2.0**-40, STAGES=1, num_warps=8, num_stages=1)  # fmt: skip
    if tiles > 1:
        d_beta = None if beta is None else d_beta.sum(0).to(beta.dtype)
        d_log_decay = None if log_decay is None else d_log_decay.sum(0).to(log_decay.dtype)
    return d_query, d_key, d_beta, d_log_decay
