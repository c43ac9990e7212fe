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
from .products import float32_precision, product


@triton.jit(do_not_specialize=["time", "per_sequence"])
def gradient_kernel(query, key, beta, d_output, innovation, d_value, entry_states, exit_gradients, cumulative,
                    d_query, d_key, d_beta, d_log_decay, table, time, per_sequence, scale, H, HV, K, V, tokens,
                    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr,
                    TIED: tl.constexpr, HAS_BETA: tl.constexpr, HAS_DECAY: tl.constexpr, DIVISIBLE: tl.constexpr,
                    PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One chunk, key head and tile of key channels; beta's and the decay's gradients are partial sums over the tiles."""
    chunk = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    tile = tl.program_id(1)
    first, length = locate_chunk(chunk, table, time, per_sequence, C, PACKED)
    row = tl.arange(0, C)
    valid = row < length
    column = tile * BK + tl.arange(0, BK)
    k_offset = row[:, None] * (H * K) + column[None, :]
    k_inside = valid[:, None] & (column < K)[None, :]
    head_key = (first * H + head) * K
    q = tl.load(query + head_key + k_offset, mask=k_inside, other=0.0)
    k = tl.load(key + head_key + k_offset, mask=k_inside, other=0.0)
    if TILES == 1:
        read = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TIED:
            gram = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    else:
        read = tl.zeros([C, C], tl.float32)
        gram = tl.zeros([C, C], tl.float32)
        for start in range(0, K, BK):
            part = start + tl.arange(0, BK)
            offset = row[:, None] * (H * K) + part[None, :]
            inside = valid[:, None] & (part < K)[None, :]
            q_part = tl.load(query + head_key + offset, mask=inside, other=0.0)
            k_part = tl.load(key + head_key + offset, mask=inside, other=0.0)
            read = tl.dot(q_part, tl.trans(k_part), read, input_precision=PRECISION)
            if TIED:
                gram = tl.dot(k_part, tl.trans(k_part), gram, input_precision=PRECISION)
    causal = row[:, None] >= row[None, :]
    strict = row[:, None] > row[None, :]
    dtype: tl.constexpr = key.dtype.element_ty
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    for j in tl.range(0, HV // H, num_stages=STAGES):
        value_head = head * (HV // H) + j
        flat = chunk * HV + value_head
        head_value = (first * HV + value_head) * V
        state_base = flat * K * V
        # what the entry and exit states take part in, and the two score-like products
        f = tl.zeros([C, C], tl.float32)
        n = tl.zeros([C, C], tl.float32)
        to_exit = tl.zeros([C, BK], tl.float32)
        dq_entry = tl.zeros([C, BK], tl.float32)
        dk_entry = tl.zeros([C, BK], tl.float32)
        overlap = 0.0
        for start in range(0, V, BV):
            channel = start + tl.arange(0, BV)
            v_offset = row[:, None] * (HV * V) + channel[None, :]
            v_inside = valid[:, None] & (channel < V)[None, :]
            s_offset = channel[:, None] * K + column[None, :]
            s_inside = (channel < V)[:, None] & (column < K)[None, :]
            do = tl.load(d_output + head_value + v_offset, mask=v_inside, other=0.0)
            r = tl.load(innovation + head_value + v_offset, mask=v_inside, other=0.0)
            state = tl.load(entry_states + state_base + s_offset, mask=s_inside, other=0.0)
            d_state = tl.load(exit_gradients + state_base + s_offset, mask=s_inside, other=0.0)
            f = tl.dot(do, tl.trans(r), f, input_precision=PRECISION)
            to_exit = tl.dot(r, d_state, to_exit, input_precision=PRECISION)
            dq_entry = tl.dot(do, state, dq_entry, input_precision=PRECISION)
            if TIED:
                w = tl.load(d_value + head_value + v_offset, mask=v_inside, other=0.0)
                n = tl.dot(w, tl.trans(r), n, input_precision=PRECISION)
                dk_entry = tl.dot(w, state, dk_entry, input_precision=PRECISION)
            if HAS_DECAY:
                overlap += tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1), 0)
        token = (first + row) * HV + value_head
        weight = tl.where(valid, 1.0, 0.0)
        if HAS_BETA:
            weight = tl.load(beta + token, mask=valid, other=0.0).to(tl.float32)
        if TIED:
            aligned = tl.sum(tl.where(row[:, None] == row[None, :], n, 0.0), 1)
        if HAS_DECAY:
            sums = cumulative + flat * 2 * C
            high = tl.load(sums + row)
            low = tl.load(sums + C + row)
            end_high = tl.load(sums + C - 1)
            end_low = tl.load(sums + 2 * C - 1)
            from_start = tl.exp2(high)
            to_end = tl.exp2((end_high - high) + (end_low - low))
            decay = decay_between(high[:, None], low[:, None], high[None, :], low[None, :], causal)
            to_exit *= to_end[:, None]
            dq_entry *= (from_start * scale)[:, None]
            f *= decay * scale
        else:
            dq_entry *= scale
            f = tl.where(causal, f, 0.0) * scale
        if TIED:
            if HAS_DECAY:
                dk_entry *= from_start[:, None]
                n = tl.where(strict, n * decay, 0.0)
            else:
                n = tl.where(strict, n, 0.0)
            pairs = f * read - n * gram
        else:
            pairs = f * read
        if TILES > 1:
            pairs = tl.where(tile == 0, pairs, 0.0)
        exits = tl.sum(to_exit * k.to(tl.float32), 1)
        slot = tile.to(tl.int64) * tokens + token
        if HAS_BETA:
            slope = tl.sum(pairs, 0) + exits
            if TIED:
                divisible = tl.abs(weight) > DIVISIBLE
                exact = tl.where(tile == 0, aligned / tl.where(divisible, weight, 1.0), 0.0)
                slope = tl.where(divisible, exact, slope)
            tl.store(d_beta + slot, slope.to(d_beta.dtype.element_ty), mask=valid)
        if HAS_DECAY:
            pairs *= weight[None, :]
            d_sum = tl.sum(pairs, 1) - tl.sum(pairs, 0) + tl.sum(dq_entry * q.to(tl.float32), 1)
            if TIED:
                d_sum -= tl.sum(dk_entry * k.to(tl.float32), 1)
            exits *= weight
            whole = tl.exp2(end_high + end_low) * overlap
            d_decay = tl.cumsum(d_sum, 0, reverse=True) + (tl.cumsum(exits, 0) - exits) + whole
            tl.store(d_log_decay + slot, d_decay.to(d_log_decay.dtype.element_ty), mask=valid)
        da = (f * weight[None, :]).to(dtype)
        dq += dq_entry
        dq = tl.dot(da, k, dq, input_precision=PRECISION)
        dk += to_exit * weight[:, None]
        dk = tl.dot(tl.trans(da), q, dk, input_precision=PRECISION)
        if TIED:
            dk -= dk_entry
            db = n * weight[None, :]
            dk -= product(db + tl.trans(db), k, PRECISION)
    tl.store(d_query + head_key + k_offset, dq.to(dtype), mask=k_inside)
    tl.store(d_key + head_key + k_offset, dk.to(dtype), mask=k_inside)


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
            heads, value_heads, k, v, d_output.numel() // v,
            C=chunks.size, BK=width, BV=tile, TILES=tiles, PACKED=chunks.packed, TIED=prepared.inverse is not None,
            HAS_BETA=beta is not None, HAS_DECAY=log_decay is not None, PRECISION=float32_precision(key.device),
            DIVISIBLE=2.0**-6 if key.dtype == torch.float16 else 2.0**-40, STAGES=1, num_warps=8, num_stages=1)  # fmt: skip
    if tiles > 1:
        d_beta = None if beta is None else d_beta.sum(0).to(beta.dtype)
        d_log_decay = None if log_decay is None else d_log_decay.sum(0).to(log_decay.dtype)
    return d_query, d_key, d_beta, d_log_decay
