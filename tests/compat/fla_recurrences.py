"""FLA's recurrences, a token at a time in float64, in FLA's own letters; no line of them goes through the engine.

Every step takes the state ``S [N, H, K, V]`` and a token's tensors ``[N, H, ·]`` and returns the next state. The
formulas are those of the docstrings and kernels of flash-linear-attention 0.6.0; where its naive references differ, the
kernels'.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import torch


def outer(left, right):
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def read(S, vector):
    """``Sᵀ vector``, ``[N, H, V]``."""
    return (S * vector.unsqueeze(-1)).sum(-2)


def decayed(S, x):
    """All decays that a token has: a head's, a key channel's, a value channel's."""
    if x.g is not None:
        S = S * torch.exp(x.g)[..., None, None]
    if x.g_gamma is not None:
        S = S * torch.exp(x.g_gamma)[..., None, None]
    if x.gk is not None:
        S = S * torch.exp(x.gk).unsqueeze(-1)
    if x.gv is not None:
        S = S * torch.exp(x.gv).unsqueeze(-2)
    return S


def write_only(S, x):
    return decayed(S, x) + outer(x.k, x.v)


def delta(S, x):
    S = decayed(S, x)
    return S + outer(x.k, x.beta * (x.v - read(S, x.k)))


def gdn2(S, x):
    S = decayed(S, x)
    return S + outer(x.k, x.w * x.v - read(S, x.b * x.k))


def comba(S, x):
    return decayed(S, x) + outer(x.k, x.beta * (x.v - read(S, x.p)))  # the removal reads what was before the decay


def product(S, x):
    S = decayed(S, x)
    for k, v, beta in zip(x.k.unbind(-2), x.v.unbind(-2), x.beta.unbind(-2), strict=True):
        S = S + outer(k, beta * (v - read(S, k)))
    return S


def plus_low_rank(S, x):
    return decayed(S, x) + outer(x.b, read(S, x.a)) + outer(x.k, x.v)


def unit(vector):
    return vector / torch.sqrt((vector * vector).sum(-1, keepdim=True) + 1e-6)


def softplus_gate(g, A_log, dt_bias):
    return -torch.exp(A_log).view(*A_log.shape, *(1 for _ in g.shape[3:])) * torch.log1p(
        torch.exp(g + dt_bias.view(g.shape[2:]))
    )


def bounded_gate(g, A_log, dt_bias, lower_bound):
    rate = torch.exp(A_log).view(*A_log.shape, *(1 for _ in g.shape[3:]))
    return lower_bound / (1 + torch.exp(-rate * (g + dt_bias.view(g.shape[2:]))))


def retention_decay(heads):
    return torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(heads)], dtype=torch.float64)


def lightning_decay(heads, layer_idx, num_layers):
    return torch.tensor([-8 / heads * (1 - layer_idx / num_layers) * h for h in range(heads)], dtype=torch.float64)


def run(step, q, scale, state, value_size, cu_seqlens=None, reverse=False, normalize=False, z=None, **tensors):
    """Outputs ``[B, T, HV, V]`` and the final states ``[N, HV, K, V]``; with ``normalize`` also the key sums ``z``.

    ``tensors [B, T, H or HV, …]`` by letter (``g_gamma [HV]``), None for what a call leaves out; key heads are
    repeated.
    """
    heads = tensors["v"].shape[2]
    tensors = {name: None if x is None else expanded(x, heads) for name, x in tensors.items()}
    q = expanded(q, heads)
    if cu_seqlens is not None:
        parts = []
        for n, (start, stop) in enumerate(pairwise(cu_seqlens)):
            cut = {name: x if x is None or x.ndim == 1 else x[:, start:stop] for name, x in tensors.items()}
            entry, keys = (None if each is None else each[n : n + 1] for each in (state, z))
            parts.append(run(step, q[:, start:stop], scale, entry, value_size, None, reverse, normalize, keys, **cut))
        outputs, states, sums = zip(*parts, strict=True)
        return torch.cat(outputs, 1), torch.cat(states), None if sums[0] is None else torch.cat(sums)
    S = q.new_zeros(q.shape[0], heads, q.shape[-1], value_size) if state is None else state
    z = q.new_zeros(q.shape[0], heads, q.shape[-1]) if z is None else z
    outputs = [None] * q.shape[1]
    for t in reversed(range(q.shape[1])) if reverse else range(q.shape[1]):
        token = {name: x if x is None or x.ndim == 1 else x[:, t] for name, x in tensors.items()}
        letters = dict.fromkeys(("g", "g_gamma", "gk", "gv"))
        x = SimpleNamespace(**{**letters, **token})
        S = step(S, x)
        outputs[t] = scale * read(S, q[:, t])
        if normalize:
            z = z + x.k
            outputs[t] = outputs[t] / (scale * (q[:, t] * z).sum(-1, keepdim=True) + 1e-10)
    output = torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], value_size)
    return output, S, z if normalize else None


def expanded(x, heads):
    return x if x.ndim == 1 or x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)
