"""The recurrence itself, token after token, for decoding: every driver, and short sequences only.

One program has a sequence, a value head and a tile of value channels; it reads its part of the state ``[K, BV]`` once,
takes the sequence's tokens one after another in registers, and writes the state once. The factors of the rows are read
where they lie. In float32, with S the tile, g a token's log-decay and a, b, u its rows:

    S <- e^g S,    x_j = a_j^T S + u_j,    S <- S + sum_j b_j x_j^T,    o = scale S^T q

Raw reads use the S before the decay; sequential rows each read what the last one left. No product of tensor cores, no
sum across programs: the bits of a sequence depend on nothing but itself.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(token, row, head, LAYOUTS: tl.constexpr, SLOT: tl.constexpr):
    """Where a token's row of a head starts. LAYOUTS has for each tensor, in the kernel's order: token stride, row
    stride, head stride, value heads a head, and whether channels follow."""
    return token * LAYOUTS[SLOT][0] + row * LAYOUTS[SLOT][1] + (head // LAYOUTS[SLOT][3]) * LAYOUTS[SLOT][2]


@triton.jit
def channels_of(tensor, token, row, head, LAYOUTS: tl.constexpr, SLOT: tl.constexpr, channel, inside):
    """A vector, in float32, zero outside."""
    return tl.load(tensor + place_of(token, row, head, LAYOUTS, SLOT) + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def coefficient_of(tensor, token, row, head, LAYOUTS: tl.constexpr, SLOT: tl.constexpr, channel, inside):
    """A coefficient, in float32: one number, or one a channel."""
    if LAYOUTS[SLOT][4]:
        found = channels_of(tensor, token, row, head, LAYOUTS, SLOT, channel, inside)
    else:
        found = tl.load(tensor + place_of(token, row, head, LAYOUTS, SLOT)).to(tl.float32)
    return found


@triton.jit
def value_of(value, coefficient, token, row, head, LAYOUTS: tl.constexpr, SLOT: tl.constexpr, SIGN: tl.constexpr,
             channel, inside):  # fmt: skip
    """u [BV]; the coefficient's slot is the next."""
    found = channels_of(value, token, row, head, LAYOUTS, SLOT, channel, inside) * SIGN
    if coefficient is not None:
        found = found * coefficient_of(coefficient, token, row, head, LAYOUTS, SLOT + 1, channel, inside)
    return found


@triton.jit
def read_row(state, seen, read, read_coefficient, write, value, value_coefficient, token, row, head,
             LAYOUTS: tl.constexpr, SIGNS: tl.constexpr, k_channel, k_inside, v_channel, v_inside):  # fmt: skip
    """The state after one row that reads ``seen``; a read that is absent is the write itself."""
    b = channels_of(write, token, row, head, LAYOUTS, 3, k_channel, k_inside)
    a = b
    if read is not None:
        a = channels_of(read, token, row, head, LAYOUTS, 1, k_channel, k_inside)
    if read_coefficient is not None:
        strength = coefficient_of(read_coefficient, token, row, head, LAYOUTS, 2, k_channel, k_inside)
        if LAYOUTS[2][4]:
            x = tl.sum((a * strength)[:, None] * seen, 0) * SIGNS[0]
        else:
            x = tl.sum(a[:, None] * seen, 0) * (strength * SIGNS[0])
    else:
        x = tl.sum(a[:, None] * seen, 0) * SIGNS[0]
    if value is not None:
        x += value_of(value, value_coefficient, token, row, head, LAYOUTS, 4, SIGNS[1], v_channel, v_inside)
    return state + b[:, None] * x[None, :]


@triton.jit
def lone_row(state, write, value, coefficient, token, row, head, LAYOUTS: tl.constexpr, SIGNS: tl.constexpr,
             k_channel, k_inside, v_channel, v_inside):  # fmt: skip
    """The state after one row that only writes."""
    b = channels_of(write, token, row, head, LAYOUTS, 6, k_channel, k_inside)
    u = value_of(value, coefficient, token, row, head, LAYOUTS, 7, SIGNS[2], v_channel, v_inside)
    return state + b[:, None] * u[None, :]


@triton.jit(do_not_specialize=["time"])
def recurrence_kernel(query, read, read_coefficient, write, value, value_coefficient, lone_write, lone_value,
                      lone_coefficient, log_decay, states, final_states, output, state_indices, accepted, cu_seqlens,
                      time, states_stride, final_stride, scale,
                      HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                      LAYOUTS: tl.constexpr, SIGNS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
                      SEQUENTIAL: tl.constexpr, RAW: tl.constexpr, SINGLE: tl.constexpr, IN_PLACE: tl.constexpr,
                      ):  # fmt: skip
    """ROWS has for each of a token's rows, in order, its number among those that read, or -1 less its number among
    those that only write. SINGLE: each sequence is one token. IN_PLACE: ``final_states`` has the slots of ``states``.
    ``accepted``: the state is stored after so many tokens."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % HV
    sequence = (tl.program_id(0) // tiles // HV).to(tl.int64)
    k_channel = tl.arange(0, BK)
    v_channel = tile * BV + tl.arange(0, BV)
    k_inside = k_channel < K
    v_inside = v_channel < V
    inside = k_inside[:, None] & v_inside[None, :]
    in_state = head * (K * V) + k_channel[:, None] * V + v_channel[None, :]
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens + sequence + 1) - first).to(tl.int32)
    elif SINGLE:
        first = sequence
        length = 1
    else:
        first = sequence * time
        length = time
    into = output + (first * HV + head) * V + v_channel

    slot = sequence
    if state_indices is not None:
        slot = tl.load(state_indices + sequence).to(tl.int64)
        if slot < 0:
            for t in tl.range(0, length):
                tl.store(into + t * (HV * V), tl.zeros([BV], output.dtype.element_ty), mask=v_inside)
            if not IN_PLACE:
                zero = tl.zeros([BK, BV], final_states.dtype.element_ty)
                tl.store(final_states + sequence * final_stride + in_state, zero, mask=inside)
            return
    target = final_states + (slot if IN_PLACE else sequence) * final_stride + in_state

    if states is not None:
        state = tl.load(states + slot * states_stride + in_state, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    if accepted is not None:
        last = tl.minimum(tl.load(accepted + sequence).to(tl.int32), length)
        if last <= 0 and not IN_PLACE:
            tl.store(target, state.to(final_states.dtype.element_ty), mask=inside)
    for t in tl.range(0, length):
        token = first + t
        q = channels_of(query, token, 0, head, LAYOUTS, 0, k_channel, k_inside)
        new = state
        if log_decay is not None:
            decay = tl.exp(coefficient_of(log_decay, token, 0, head, LAYOUTS, 9, k_channel, k_inside))
            if LAYOUTS[9][4]:
                new = state * decay[:, None]
            else:
                new = state * decay
        seen = state if RAW else new
        for place in tl.static_range(RANK):
            if ROWS[place] >= 0:
                new = read_row(new, new if SEQUENTIAL else seen, read, read_coefficient, write, value,
                               value_coefficient, token, ROWS[place], head, LAYOUTS, SIGNS, k_channel, k_inside,
                               v_channel, v_inside)  # fmt: skip
            else:
                new = lone_row(new, lone_write, lone_value, lone_coefficient, token, -1 - ROWS[place], head, LAYOUTS,
                               SIGNS, k_channel, k_inside, v_channel, v_inside)  # fmt: skip
        state = new
        o = tl.sum(q[:, None] * state, 0) * scale
        tl.store(into + t * (HV * V), o.to(output.dtype.element_ty), mask=v_inside)
        if accepted is not None:  # noqa: SIM102 (decided when the kernel is compiled)
            if t + 1 == last:
                tl.store(target, state.to(final_states.dtype.element_ty), mask=inside)
    if accepted is None:
        tl.store(target, state.to(final_states.dtype.element_ty), mask=inside)
