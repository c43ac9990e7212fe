"""The delta rule and write-only rows, token by token in float64: what the kernels are held against."""

import torch
from torch import Tensor

NAMES = ("query", "key", "value", "beta", "log_decay", "initial_state")


def recurrence(query, key, value, beta, log_decay, initial_state, *, tied, scale, lengths=None):
    """Outputs [B, T, HV, V] and final states [N, HV, K, V] of regular batches, or of packed sequences of `lengths`."""
    group = value.shape[2] // query.shape[2]
    query, key = query.repeat_interleave(group, 2), key.repeat_interleave(group, 2)
    if lengths is None:
        spans = [(b, 0, value.shape[1]) for b in range(value.shape[0])]
    else:
        ends = torch.tensor(lengths).cumsum(0).tolist()
        spans = [(0, end - length, end) for end, length in zip(ends, lengths, strict=True)]
    rows, finals = {b: [] for b in range(value.shape[0])}, []
    for n, (b, start, end) in enumerate(spans):
        state = value.new_zeros(value.shape[2], query.shape[3], value.shape[3])
        if initial_state is not None:
            state = state + initial_state[n]
        for t in range(start, end):
            if log_decay is not None:
                state = state * log_decay[b, t].exp()[:, None, None]
            written = value[b, t]
            if tied:
                written = written - torch.einsum("hk,hkv->hv", key[b, t], state)
            if beta is not None:
                written = written * beta[b, t][:, None]
            state = state + key[b, t][:, :, None] * written[:, None, :]
            rows[b].append(scale * torch.einsum("hk,hkv->hv", query[b, t], state))
        finals.append(state)
    return torch.stack([torch.stack(rows[b]) for b in rows]), torch.stack(finals)


def results(inputs: dict[str, Tensor | None], cotangents: tuple[Tensor, Tensor], **options) -> dict[str, Tensor]:
    """Output, final state and every gradient, in float64."""
    leaves = {n: None if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()}
    output, final = recurrence(*[leaves[n] for n in NAMES], **options)
    present = [n for n in NAMES if leaves[n] is not None]
    loss = (output * cotangents[0].double()).sum() + (final * cotangents[1].double()).sum()
    gradients = torch.autograd.grad(loss, [leaves[n] for n in present])
    named = {f"d_{n}": g for n, g in zip(present, gradients, strict=True)}
    return {"output": output.detach(), "final_state": final.detach(), **named}


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN and Inf in `got` count as infinite."""
    difference = (got.double() - expected.double()).norm()
    ratio = (difference / expected.double().norm().clamp_min(1e-300)).item()
    return ratio if ratio == ratio else float("inf")
