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
    query: Tensor, tokens: tuple[Tensor, ...], advance: Callable[..., Tensor], scale: float | None = None
) -> Pair:
    """`S_t = advance(S_{t-1}, *token)` and `o_t = scale · S_tᵀ q_t` for every token; scale is K^-1/2 unless given.

    `tokens` are tensors [B, T, ...], the value [B, T, ..., V] first: `advance` gets each of them at t.
    """
    batch, _, heads, key_size = query.shape
    state = query.new_zeros(batch, heads, key_size, tokens[0].shape[-1])
    outputs = []
    for now, *token in zip(query.unbind(1), *(x.unbind(1) for x in tokens), strict=True):
        state = advance(state, *token)
        outputs.append(_read(state, now))
    return (key_size**-0.5 if scale is None else scale) * torch.stack(outputs, dim=1), state


def _read(state: Tensor, vector: Tensor) -> Tensor:
    """`Sᵀ x`: [B, H, K, V] and [B, H, K] give [B, H, V]."""
    return (vector.unsqueeze(-2) @ state).squeeze(-2)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """`x yᵀ`: [B, H, K] and [B, H, V] give [B, H, K, V]."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _add(state: Tensor, value: Tensor, key: Tensor) -> Tensor:
    """`S + k vᵀ`."""
    return state + _outer(key, value)


def _delta(state: Tensor, value: Tensor, key: Tensor, beta: Tensor) -> Tensor:
    """`(I - β k kᵀ) S + β k vᵀ`, as the correction of what the state holds under k."""
    return state + _outer(key, beta.unsqueeze(-1) * (value - _read(state, key)))


def _scalar(log_decay: Tensor) -> Tensor:
    """`e^g` of one decay a head, [..., H] to [..., H, 1, 1]."""
    return log_decay.exp()[..., None, None]


def _vector(log_decay: Tensor) -> Tensor:
    """`e^g` of one decay a key channel, [..., H, K] to [..., H, K, 1]."""
    return log_decay.exp().unsqueeze(-1)


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Pair:
    """S_t = S_{t-1} + k vᵀ (Katharopoulos et al. 2020, arXiv 2006.16236)."""
    return _loop(query, (value, key), _add)


def retention(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Pair:
    """S_t = γ S_{t-1} + k vᵀ, one γ for each head (Sun et al. 2023, arXiv 2307.08621)."""
    gamma = _scalar(log_decay)
    return _loop(query, (value, key), lambda state, v, k: _add(gamma * state, v, k))


def lightning_attention(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Pair:
    """S_t = λ S_{t-1} + k vᵀ, one λ for each head (Qin et al. 2024, arXiv 2405.17381)."""
    return retention(query, key, value, log_decay)


def ssd(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Pair:
    """h_t = e^{A Δ} h_{t-1} + B (Δ x)ᵀ, y_t = hᵀ C (Dao and Gu 2024, arXiv 2405.21060); scale 1."""
    tokens = (value, key, _scalar(log_decay))
    return _loop(query, tokens, lambda state, v, k, decay: _add(decay * state, v, k), scale=1.0)


def gated_linear_attention(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Pair:
    """S_t = diag(α) S_{t-1} + k vᵀ (Yang et al. 2024, arXiv 2312.06635)."""
    return _loop(query, (value, key, _vector(log_decay)), lambda state, v, k, alpha: _add(alpha * state, v, k))


def delta_rule(query: Tensor, key: Tensor, value: Tensor, beta: Tensor) -> Pair:
    """S_t = (I - β k kᵀ) S_{t-1} + β k vᵀ (Yang et al. 2024, arXiv 2406.06484)."""
    return _loop(query, (value, key, beta), _delta)


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor) -> Pair:
    """S_t = (I - β k kᵀ) α S_{t-1} + β k vᵀ, α a scalar (Yang et al. 2025, arXiv 2412.06464)."""
    tokens = (value, key, beta, _scalar(log_decay))
    return _loop(query, tokens, lambda state, v, k, b, alpha: _delta(alpha * state, v, k, b))


def gated_delta_rule_2(
    query: Tensor, key: Tensor, value: Tensor, erase: Tensor, write: Tensor, log_decay: Tensor
) -> Pair:
    """S_t = (I - k (b⊙k)ᵀ) diag(α) S_{t-1} + k (w⊙v)ᵀ: b erases and w writes, channel by channel."""

    def advance(state: Tensor, written: Tensor, key: Tensor, erased: Tensor, alpha: Tensor) -> Tensor:
        state = alpha * state
        return state + _outer(key, written - _read(state, erased))

    return _loop(query, (write * value, key, erase * key, _vector(log_decay)), advance)


def kimi_delta_attention(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor) -> Pair:
    """S_t = (I - β k kᵀ) diag(α) S_{t-1} + β k vᵀ (Kimi Team 2025, arXiv 2510.26692)."""
    tokens = (value, key, beta, _vector(log_decay))
    return _loop(query, tokens, lambda state, v, k, b, alpha: _delta(alpha * state, v, k, b))


def comba(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, *, removal_key: Tensor) -> Pair:
    """S_t = (α I - β k pᵀ) S_{t-1} + β k vᵀ: p reads before the decay (Hu et al. 2025, arXiv 2506.02475)."""

    def advance(state: Tensor, value: Tensor, key: Tensor, removal: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
        return alpha * state + _outer(key, beta.unsqueeze(-1) * (value - _read(state, removal)))

    return _loop(query, (value, key, removal_key, beta, _scalar(log_decay)), advance)


def delta_product(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Pair:
    """The delta rule once for each row of a token, after the decay (Siems et al. 2025, arXiv 2502.10297)."""

    def advance(state: Tensor, value: Tensor, key: Tensor, beta: Tensor, *decay: Tensor) -> Tensor:
        for alpha in decay:
            state = alpha * state
        for row in zip(value.unbind(1), key.unbind(1), beta.unbind(1), strict=True):
            state = _delta(state, *row)
        return state

    decay = () if log_decay is None else (_scalar(log_decay),)
    return _loop(query, (value, key, beta, *decay), advance)


def rwkv7(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, *, read: Tensor, write: Tensor) -> Pair:
    """S_t = (diag(w) + b aᵀ) S_{t-1} + k vᵀ, a reads before the decay (Peng et al. 2025, arXiv 2503.14456); scale 1."""

    def advance(state: Tensor, value: Tensor, key: Tensor, read: Tensor, write: Tensor, decay: Tensor) -> Tensor:
        return decay * state + _outer(write, _read(state, read)) + _outer(key, value)

    return _loop(query, (value, key, read, write, _vector(log_decay)), advance, scale=1.0)


def longhorn(query: Tensor, key: Tensor, value: Tensor, beta: Tensor) -> Pair:
    """The implicit step of the online regression, strength β / (1 + β ‖k‖²) (Liu et al. 2024, arXiv 2407.14207)."""
    return delta_rule(query, key, value, beta / (1 + beta * key.square().sum(-1)))


def efla(query: Tensor, key: Tensor, value: Tensor, beta: Tensor) -> Pair:
    """The exact flow over a token, strength (1 - e^{-β ‖k‖²}) / ‖k‖² (Lei et al. 2025, arXiv 2512.12602)."""
    square = key.square().sum(-1)
    return delta_rule(query, key, value, -torch.expm1(-beta * square) / square)


def low_rank_flow(
    query: Tensor, value: Tensor, log_decay: Tensor | None = None, *, read: Tensor, write: Tensor
) -> Pair:
    """S_t = (I + Σ_j b_j a_jᵀ) diag(α) S_{t-1} + Σ_j b_j u_jᵀ, all rows at once (Muca Cirone and Salvi 2025,
    arXiv 2504.00492)."""

    def advance(state: Tensor, value: Tensor, reads: Tensor, writes: Tensor, *decay: Tensor) -> Tensor:
        for alpha in decay:
            state = alpha * state
        return state + writes.transpose(-1, -2) @ (reads @ state + value)  # [B, H, R, ·] each

    decay = () if log_decay is None else ((_vector if log_decay.ndim == 4 else _scalar)(log_decay),)
    value, read, write = (x.transpose(2, 3) for x in (value, read, write))
    return _loop(query, (value, read, write, *decay), advance)


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
