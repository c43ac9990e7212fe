"""Every model as its published recurrence: a plain loop over tokens, sharing no code with the engine.

This is what the demonstration holds the chunked functions against, and what it times them against. Each function takes
the tensors of its namesake in `parallelflow.functional`, one key head for every value head, and returns
`(output [B, T, H, V], final state [B, H, K, V])`. The decays are applied where each paper applies them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def _loop(
    query: Tensor,
    value_size: int,
    advance: Callable[[Tensor, int], Tensor],
    scale: float | None = None,
) -> Pair:
    """`S_t = advance(S_{t-1}, t)` and `o_t = scale · S_tᵀ q_t` for every token; scale is K^-1/2 unless given."""
    batch, length, heads, key_size = query.shape
    scale = key_size**-0.5 if scale is None else scale
    state = query.new_zeros(batch, heads, key_size, value_size)
    outputs = []
    for t in range(length):
        state = advance(state, t)
        outputs.append(_read(state, query[:, t]))
    return scale * torch.stack(outputs, dim=1), state


def _read(state: Tensor, vector: Tensor) -> Tensor:
    """`Sᵀ x`: [B, H, K, V] and [B, H, K] give [B, H, V]."""
    return (vector.unsqueeze(-2) @ state).squeeze(-2)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """`x yᵀ`: [B, H, K] and [B, H, V] give [B, H, K, V]."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _delta(state: Tensor, key: Tensor, value: Tensor, beta: Tensor) -> Tensor:
    """`(I - β k kᵀ) S + β k vᵀ`, as the correction of what the state holds under k."""
    return state + _outer(key, beta.unsqueeze(-1) * (value - _read(state, key)))


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Pair:
    """S_t = S_{t-1} + k vᵀ (Katharopoulos et al. 2020, arXiv 2006.16236)."""

    def advance(state: Tensor, t: int) -> Tensor:
        return state + _outer(key[:, t], value[:, t])

    return _loop(query, value.shape[-1], advance)


def retention(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Pair:
    """S_t = γ S_{t-1} + k vᵀ, one γ for each head (Sun et al. 2023, arXiv 2307.08621)."""
    gamma = log_decay.exp()[:, None, None]

    def advance(state: Tensor, t: int) -> Tensor:
        return gamma * state + _outer(key[:, t], value[:, t])

    return _loop(query, value.shape[-1], advance)


def lightning_attention(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Pair:
    """S_t = λ S_{t-1} + k vᵀ, one λ for each head (Qin et al. 2024, arXiv 2405.17381)."""
    return retention(query, key, value, log_decay)


def ssd(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Pair:
    """h_t = e^{A Δ} h_{t-1} + B (Δ x)ᵀ, y_t = hᵀ C (Dao and Gu 2024, arXiv 2405.21060); scale 1."""
    decay = log_decay.exp()[..., None, None]

    def advance(state: Tensor, t: int) -> Tensor:
        return decay[:, t] * state + _outer(key[:, t], value[:, t])

    return _loop(query, value.shape[-1], advance, scale=1.0)


def gated_linear_attention(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Pair:
    """S_t = diag(α) S_{t-1} + k vᵀ (Yang et al. 2024, arXiv 2312.06635)."""
    decay = log_decay.exp().unsqueeze(-1)

    def advance(state: Tensor, t: int) -> Tensor:
        return decay[:, t] * state + _outer(key[:, t], value[:, t])

    return _loop(query, value.shape[-1], advance)


def delta_rule(query: Tensor, key: Tensor, value: Tensor, beta: Tensor) -> Pair:
    """S_t = (I - β k kᵀ) S_{t-1} + β k vᵀ (Yang et al. 2024, arXiv 2406.06484)."""

    def advance(state: Tensor, t: int) -> Tensor:
        return _delta(state, key[:, t], value[:, t], beta[:, t])

    return _loop(query, value.shape[-1], advance)


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor) -> Pair:
    """S_t = (I - β k kᵀ) α S_{t-1} + β k vᵀ, α a scalar (Yang et al. 2025, arXiv 2412.06464)."""
    decay = log_decay.exp()[..., None, None]

    def advance(state: Tensor, t: int) -> Tensor:
        return _delta(decay[:, t] * state, key[:, t], value[:, t], beta[:, t])

    return _loop(query, value.shape[-1], advance)


def gated_delta_rule_2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    erase: Tensor,
    write: Tensor,
    log_decay: Tensor,
) -> Pair:
    """S_t = (I - k (b⊙k)ᵀ) diag(α) S_{t-1} + k (w⊙v)ᵀ, b erases and w writes channel by channel."""
    decay = log_decay.exp().unsqueeze(-1)

    def advance(state: Tensor, t: int) -> Tensor:
        state = decay[:, t] * state
        held = _read(state, erase[:, t] * key[:, t])
        return state + _outer(key[:, t], write[:, t] * value[:, t] - held)

    return _loop(query, value.shape[-1], advance)


def kimi_delta_attention(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor) -> Pair:
    """S_t = (I - β k kᵀ) diag(α) S_{t-1} + β k vᵀ (Kimi Team 2025, arXiv 2510.26692)."""
    decay = log_decay.exp().unsqueeze(-1)

    def advance(state: Tensor, t: int) -> Tensor:
        return _delta(decay[:, t] * state, key[:, t], value[:, t], beta[:, t])

    return _loop(query, value.shape[-1], advance)


def comba(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    removal_key: Tensor,
) -> Pair:
    """S_t = (α I - β k pᵀ) S_{t-1} + β k vᵀ: p reads the state before its decay (Hu et al. 2025, arXiv 2506.02475)."""
    decay = log_decay.exp()[..., None, None]

    def advance(state: Tensor, t: int) -> Tensor:
        correction = beta[:, t].unsqueeze(-1) * (value[:, t] - _read(state, removal_key[:, t]))
        return decay[:, t] * state + _outer(key[:, t], correction)

    return _loop(query, value.shape[-1], advance)


def delta_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
) -> Pair:
    """The delta rule once for each row of a token, after the decay (Siems et al. 2025, arXiv 2502.10297)."""

    def advance(state: Tensor, t: int) -> Tensor:
        if log_decay is not None:
            state = log_decay[:, t].exp()[..., None, None] * state
        for j in range(key.shape[2]):
            state = _delta(state, key[:, t, j], value[:, t, j], beta[:, t, j])
        return state

    return _loop(query, value.shape[-1], advance)


def rwkv7(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    read: Tensor,
    write: Tensor,
) -> Pair:
    """S_t = (diag(w) + b aᵀ) S_{t-1} + k vᵀ, a reads before the decay (Peng et al. 2025, arXiv 2503.14456); scale 1."""
    decay = log_decay.exp().unsqueeze(-1)

    def advance(state: Tensor, t: int) -> Tensor:
        modified = decay[:, t] * state + _outer(write[:, t], _read(state, read[:, t]))
        return modified + _outer(key[:, t], value[:, t])

    return _loop(query, value.shape[-1], advance, scale=1.0)


def longhorn(query: Tensor, key: Tensor, value: Tensor, beta: Tensor) -> Pair:
    """The implicit step of the online regression, strength β / (1 + β ‖k‖²) (Liu et al. 2024, arXiv 2407.14207)."""
    strength = beta / (1 + beta * key.square().sum(-1))
    return delta_rule(query, key, value, strength)


def efla(query: Tensor, key: Tensor, value: Tensor, beta: Tensor) -> Pair:
    """The exact flow over a token, strength (1 - e^{-β ‖k‖²}) / ‖k‖² (Lei et al. 2025, arXiv 2512.12602)."""
    square = key.square().sum(-1)
    return delta_rule(query, key, value, -torch.expm1(-beta * square) / square)


def low_rank_flow(
    query: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    read: Tensor,
    write: Tensor,
) -> Pair:
    """S_t = (I + Σ_j b_j a_jᵀ) diag(α) S_{t-1} + Σ_j b_j u_jᵀ, all rows at once (Muca Cirone and Salvi 2025,
    arXiv 2504.00492)."""

    def advance(state: Tensor, t: int) -> Tensor:
        if log_decay is not None:
            decay = log_decay[:, t].exp()
            state = (decay.unsqueeze(-1) if decay.ndim == 3 else decay[..., None, None]) * state
        reads, writes = read[:, t].transpose(1, 2), write[:, t].transpose(1, 2)  # [B, H, R, K]
        return state + writes.transpose(-1, -2) @ (reads @ state + value[:, t].transpose(1, 2))

    return _loop(query, value.shape[-1], advance)


MODELS: tuple[Callable[..., Pair], ...] = (
    linear_attention,
    retention,
    lightning_attention,
    ssd,
    gated_linear_attention,
    delta_rule,
    gated_delta_rule,
    gated_delta_rule_2,
    kimi_delta_attention,
    comba,
    delta_product,
    rwkv7,
    longhorn,
    efla,
    low_rank_flow,
)
"""Every model; each has the name of its function in `parallelflow.functional`."""
