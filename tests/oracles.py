"""Every model as its published recurrence, one token after another: the oracles of the whole test suite.

Each function is written from the formula of its paper, in the state convention `S [K, V]`, `o_t = scale * S_t^T q_t`
(papers that write the transposed state are transposed here). Nothing of the package is used. The transition matrices
are formed as written, so nothing relies on the low-rank structure under test, except in `low_rank_flow`, which is that
structure itself, in loops. All operations are plain autograd ones: the oracle of a gradient is autograd through these.

Shapes: query, key [B, T, H, K], value [B, T, HV, V], everything else per value head. All tensors of one dtype.
A recurrence returns `(output [B, T, HV, V], final state [B, HV, K, V])`; `evaluate` adds what all models share
(working precision, packed sequences, normalised queries and keys, states at positions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor, int], Tensor]


class Reference(NamedTuple):
    output: Tensor
    final_state: Tensor
    states: Tensor | None = None


def outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]


def identity_like(vector: Tensor) -> Tensor:
    return torch.eye(vector.shape[-1], dtype=vector.dtype, device=vector.device)


def per_value_head(tensor: Tensor, value_heads: int) -> Tensor:
    """Value head h reads key head h // (HV / H); heads are the last axis but one."""
    group = value_heads // tensor.shape[-2]
    return torch.stack([tensor[..., head // group, :] for head in range(value_heads)], dim=-2)


def read_out(step: Step, query: Tensor, value: Tensor, scale: float, state: Tensor | None) -> Reference:
    """Runs `state <- step(state, t)` over all tokens and reads `scale * S_t^T q_t` after each."""
    batch, length, value_heads, key_size = query.shape
    if state is None:
        state = query.new_zeros(batch, value_heads, key_size, value.shape[-1])
    outputs = [query.new_zeros(batch, 0, value_heads, value.shape[-1])]
    for t in range(length):
        state = step(state, t)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", query[:, t], state)[:, None])
    return Reference(torch.cat(outputs, dim=1), state)


def linear_attention(query, key, value, *, normalize=False, scale, initial_state):
    """S_t = S_{t-1} + k v^T, z_t = z_{t-1} + k, o = S^T q / (z^T q) if normalised.

    Katharopoulos, Vyas, Pappas, Fleuret 2020, arXiv 2006.16236, equations 10 to 12. The normaliser z is the last
    column of the state.
    """
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)
    if not normalize:
        return read_out(lambda s, t: s + outer(key[:, t], value[:, t]), query, value, scale, initial_state)
    if initial_state is None:
        initial_state = query.new_zeros(query.shape[0], heads, query.shape[-1], value.shape[-1] + 1)
    memory, normaliser = initial_state[..., :-1], initial_state[..., -1]
    outputs = [torch.zeros_like(value[:, :0])]
    for t in range(query.shape[1]):
        memory = memory + outer(key[:, t], value[:, t])
        normaliser = normaliser + key[:, t]
        weight = (normaliser * query[:, t]).sum(-1, keepdim=True)
        outputs.append((torch.einsum("bhk,bhkv->bhv", query[:, t], memory) / weight)[:, None])
    return Reference(torch.cat(outputs, dim=1), torch.cat([memory, normaliser[..., None]], dim=-1))


def retention(query, key, value, log_decay, *, scale, initial_state):
    """S_t = gamma S_{t-1} + k v^T, one gamma per head (Sun et al. 2023, arXiv 2307.08621, equation 6)."""
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)
    gamma = log_decay.exp()[None, :, None, None]
    return read_out(lambda s, t: gamma * s + outer(key[:, t], value[:, t]), query, value, scale, initial_state)


def lightning_attention(query, key, value, log_decay, *, scale, initial_state):
    """kv_t = lambda kv_{t-1} + k v^T, one lambda per head (Qin et al. 2024, arXiv 2401.04658, section 3)."""
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)

    def step(state, t):
        decayed = torch.stack([state[:, h] * torch.exp(log_decay[h]) for h in range(heads)], dim=1)
        return decayed + outer(key[:, t], value[:, t])

    return read_out(step, query, value, scale, initial_state)


def ssd(query, key, value, log_decay, *, scale, initial_state):
    """h_t = exp(A dt_t) h_{t-1} + B_t (dt_t x_t)^T, y_t = C_t^T h_t (Dao, Gu 2024, arXiv 2405.21060).

    C is the query, B the key, dt x the value, A dt the log-decay.
    """
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)

    def step(state, t):
        return torch.exp(log_decay[:, t, :, None, None]) * state + outer(key[:, t], value[:, t])

    return read_out(step, query, value, scale, initial_state)


def gated_linear_attention(query, key, value, log_decay, *, scale, initial_state):
    """S_t = diag(alpha_t) S_{t-1} + k v^T (Yang et al. 2023, arXiv 2312.06635, equation 3)."""
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)

    def step(state, t):
        return torch.diag_embed(log_decay[:, t].exp()) @ state + outer(key[:, t], value[:, t])

    return read_out(step, query, value, scale, initial_state)


def delta_rule(query, key, value, beta, *, scale, initial_state):
    """S_t = (I - beta k k^T) S_{t-1} + beta k v^T (Yang et al. 2024, arXiv 2406.06484)."""
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)

    def step(state, t):
        strength = beta[:, t, :, None, None]
        householder = identity_like(key) - strength * outer(key[:, t], key[:, t])
        return householder @ state + strength * outer(key[:, t], value[:, t])

    return read_out(step, query, value, scale, initial_state)


def gated_delta_rule(query, key, value, beta, log_decay, *, scale, initial_state):
    """S_t = alpha (I - beta k k^T) S_{t-1} + beta k v^T (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464, eq. 10)."""
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)

    def step(state, t):
        strength = beta[:, t, :, None, None]
        alpha = torch.exp(log_decay[:, t, :, None, None])
        householder = identity_like(key) - strength * outer(key[:, t], key[:, t])
        return alpha * (householder @ state) + strength * outer(key[:, t], value[:, t])

    return read_out(step, query, value, scale, initial_state)


def gated_delta_rule_2(query, key, value, erase, write, log_decay, *, scale, initial_state):
    """S_t = (I - k (b * k)^T) diag(alpha) S_{t-1} + k (w * v)^T: erase gate b [K] and write gate w [V] of their own."""
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)

    def step(state, t):
        transition = identity_like(key) - outer(key[:, t], erase[:, t] * key[:, t])
        decayed = torch.diag_embed(log_decay[:, t].exp()) @ state
        return transition @ decayed + outer(key[:, t], write[:, t] * value[:, t])

    return read_out(step, query, value, scale, initial_state)


def kimi_delta_attention(query, key, value, beta, log_decay, *, scale, initial_state):
    """S_t = (I - beta k k^T) diag(alpha) S_{t-1} + beta k v^T (Kimi Team 2025, arXiv 2510.26692, equation 1)."""
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)

    def step(state, t):
        strength = beta[:, t, :, None, None]
        transition = identity_like(key) - strength * outer(key[:, t], key[:, t])
        decayed = torch.diag_embed(log_decay[:, t].exp()) @ state
        return transition @ decayed + strength * outer(key[:, t], value[:, t])

    return read_out(step, query, value, scale, initial_state)


def comba(query, key, value, beta, log_decay, *, removal_key, scale, initial_state):
    """S_t = (alpha I - beta k p^T) S_{t-1} + beta k v^T: the removal reads the state before its decay.

    Hu et al. 2025, arXiv 2506.02475, with the removal key p a tensor of its own.
    """
    heads = value.shape[-2]
    query, key, removal_key = (per_value_head(x, heads) for x in (query, key, removal_key))

    def step(state, t):
        strength = beta[:, t, :, None, None]
        alpha = torch.exp(log_decay[:, t, :, None, None])
        transition = alpha * identity_like(key) - strength * outer(key[:, t], removal_key[:, t])
        return transition @ state + strength * outer(key[:, t], value[:, t])

    return read_out(step, query, value, scale, initial_state)


def delta_product(query, key, value, beta, log_decay=None, *, scale, initial_state):
    """n delta-rule steps a token, the decay before the first: S <- (I - beta_j k_j k_j^T) S + beta_j k_j v_j^T.

    Siems et al. 2025, arXiv 2502.10297, equations 4 and 5. key [B, T, n, H, K], value [B, T, n, HV, V].
    """
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)

    def step(state, t):
        if log_decay is not None:
            state = torch.exp(log_decay[:, t, :, None, None]) * state
        for j in range(key.shape[2]):
            strength = beta[:, t, j, :, None, None]
            householder = identity_like(key) - strength * outer(key[:, t, j], key[:, t, j])
            state = householder @ state + strength * outer(key[:, t, j], value[:, t, j])
        return state

    return read_out(step, query, value, scale, initial_state)


def rwkv7(query, key, value, log_decay, *, read, write, scale, initial_state):
    """S_t = (diag(w) + b a^T) S_{t-1} + k v^T (Peng et al. 2025, arXiv 2503.14456, equation 17, transposed).

    There a is minus the normalised removal key and b that key times the in-context learning rate.
    """
    heads = value.shape[-2]
    query, key = per_value_head(query, heads), per_value_head(key, heads)

    def step(state, t):
        transition = torch.diag_embed(log_decay[:, t].exp()) + outer(write[:, t], read[:, t])
        return transition @ state + outer(key[:, t], value[:, t])

    return read_out(step, query, value, scale, initial_state)


def longhorn(query, key, value, beta, *, scale, initial_state):
    """S_t = (I - e k k^T) S_{t-1} + e k v^T with e = beta / (1 + beta |k|^2), the closed form of the implicit step.

    Liu et al. 2024, arXiv 2407.14207, theorem 3.1 with one beta per head and without its diagonal approximation.
    """
    heads = value.shape[-2]
    strength = beta / (1 + beta * per_value_head(key, heads).square().sum(-1))
    return delta_rule(query, key, value, strength, scale=scale, initial_state=initial_state)


def efla(query, key, value, beta, *, scale, initial_state):
    """S_t = (I - e k k^T) S_{t-1} + e k v^T with e = (1 - exp(-beta |k|^2)) / |k|^2, beta where k = 0.

    Lei et al. 2025, arXiv 2512.12602: the exact solution of dS = beta k (v - S^T k)^T dt over one unit of time.
    """
    heads = value.shape[-2]
    squared = per_value_head(key, heads).square().sum(-1)
    nonzero = torch.where(squared == 0, 1.0, squared)
    strength = torch.where(squared == 0, beta, -torch.expm1(-beta * squared) / nonzero)
    return delta_rule(query, key, value, strength, scale=scale, initial_state=initial_state)


def low_rank_flow(
    query, value, log_decay=None, *, read, write, order="simultaneous", reads="decayed", scale, initial_state
):
    """The general system of Muca Cirone and Salvi 2025, arXiv 2504.00492, in discrete time.

    S <- diag(e^g) S, then for the rows of the token S <- S + b_j (a_j^T S' + u_j^T); S' is, with simultaneous rows, the
    state all rows of the token start from (decayed, or raw: before the decay), with sequential rows the running state.
    read, write [B, T, R, H or HV, K], value [B, T, R, HV, V], log_decay None, [B, T, HV] or [B, T, HV, K].
    """
    heads = value.shape[-2]
    query, read, write = (per_value_head(x, heads) for x in (query, read, write))

    def step(state, t):
        before = state
        if log_decay is not None:
            gate = log_decay[:, t] if log_decay.dim() == 4 else log_decay[:, t, :, None]
            state = gate.exp()[..., None] * state
        if reads == "decayed":
            before = state
        for j in range(read.shape[2]):
            seen = before if order == "simultaneous" or reads == "raw" else state
            answer = torch.einsum("bhk,bhkv->bhv", read[:, t, j], seen) + value[:, t, j]
            state = state + outer(write[:, t, j], answer)
        return state

    return read_out(step, query, value, scale, initial_state)


def unit(tensor: Tensor) -> Tensor:
    return tensor / torch.sqrt(tensor.square().sum(-1, keepdim=True) + 1e-6)


def evaluate(
    recurrence: Callable[..., Reference],
    inputs: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    normalized: Sequence[str] = (),
    state_positions: Sequence[int] = (),
    **options: Any,
) -> Reference:
    """A recurrence in working precision `dtype`, with what all models share.

    cu_seqlens: packed sequences, each run on its own; the state then has one row per sequence.
    normalized: names of inputs to scale to unit length, x * rsqrt(sum x^2 + 1e-6), before anything else.
    state_positions: token counts after which the state is returned as well, [B, P, HV, K, V].
    """
    tensors = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    tensors |= {name: unit(tensors[name]) for name in normalized}
    if scale is None:
        scale = 1.0 if recurrence in (rwkv7, ssd) else inputs["query"].shape[-1] ** -0.5
    state = None if initial_state is None else initial_state.to(dtype)

    def run(start: int | None, stop: int | None, entry: Tensor | None) -> Reference:
        part = {name: x if x.dim() == 1 else x[:, start:stop] for name, x in tensors.items()}
        return recurrence(**part, scale=scale, initial_state=entry, **options)

    if cu_seqlens is not None:
        bounds = [int(x) for x in cu_seqlens]
        parts = []
        for n, (start, stop) in enumerate(pairwise(bounds)):
            parts.append(run(start, stop, None if state is None else state[n : n + 1]))
        return Reference(torch.cat([p.output for p in parts], dim=1), torch.cat([p.final_state for p in parts]))
    whole = run(None, None, state)
    if not state_positions:
        return whole
    states = [run(0, position, state).final_state for position in state_positions]
    return Reference(whole.output, whole.final_state, torch.stack(states, dim=1))
