"""Inputs for the kernels of the delta rule and write-only rows, and the kernels against the float64 recurrence.

Budget: inputs drawn in float64 are rounded to the kernel's dtype; rounding them and the results costs some error
against the unrounded recurrence, and the kernel may cost at most twice that.
"""

from itertools import accumulate

import torch
from delta_recurrence import NAMES, relative, results

from parallelflow.kernels import delta

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(time, heads, value_heads, k, v, *, batch=1, sequences=None, beta=True, decay=None, cosine=0.0, initial=False,
         seed=0):  # fmt: skip
    """Inputs in float64 with unit keys; `decay` names a kind of log-decay, `cosine` correlates the keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    key = unit(normal(batch, time, heads, k))
    key = unit(cosine**0.5 * unit(normal(1, 1, heads, k)) + (1 - cosine) ** 0.5 * key)
    strength = normal(batch, time, value_heads).sigmoid()
    if cosine:
        strength = 2 * strength
    steps = normal(batch, time, value_heads)
    uniform = torch.rand(batch, time, value_heads, generator=generator, dtype=torch.float64)
    log_decay = {
        None: None,
        "mild": -0.2 * steps.exp(),
        "strong": torch.where(uniform < 0.3, -100.0, torch.where(uniform < 0.6, -1e-6, 0.0)).double(),
        "resets": torch.where(uniform < 0.1, float("-inf"), -0.1 * uniform),
    }[decay]
    return {
        "query": unit(normal(batch, time, heads, k)),
        "key": key,
        "value": normal(batch, time, value_heads, v),
        "beta": strength if beta else None,
        "log_decay": log_decay,
        "initial_state": 0.5 * normal(sequences or batch, value_heads, k, v) if initial else None,
    }


def kernel_results(inputs, cotangents, *, tied, scale, lengths=None, known=False):
    """Output, final state and gradients; `known`: the host has the packed sequences' boundaries."""
    options = {"tied": tied, "scale": scale, "initial_state": inputs["initial_state"]}
    if known:
        options["sequence_starts"] = tuple(accumulate(lengths, initial=0))
    elif lengths is not None:
        host = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        options |= {"cu_seqlens": host.to(DEVICE), "cu_seqlens_host": host if len(lengths) % 2 else None}
    five = [inputs[n] for n in NAMES[:5]]
    output, final, saved = delta.forward(*five, need_final_state=True, save_for_backward=True, **options)
    gradients = delta.backward(*five, saved, *cotangents, **options)
    named = {f"d_{n}": g for n, g in zip(NAMES, gradients, strict=True) if g is not None}
    return {"output": output, "final_state": final, **named}


def check(inputs, dtype, *, tied, lengths=None, scale=0.3, known=False):
    generator = torch.Generator().manual_seed(9)
    state_shape = (len(lengths) if lengths else inputs["value"].shape[0], inputs["value"].shape[2],
                   inputs["query"].shape[3], inputs["value"].shape[3])  # fmt: skip
    exact = (torch.randn(inputs["value"].shape, generator=generator, dtype=torch.float64),
             torch.randn(state_shape, generator=generator, dtype=torch.float64))  # fmt: skip
    options = {"tied": tied, "scale": scale, "lengths": lengths}
    truth = results(inputs, exact, **options)
    kinds = {n: dtype if n in ("query", "key", "value") else torch.float32 for n in NAMES}
    rounded = {n: None if x is None else x.to(kinds[n]) for n, x in inputs.items()}
    cotangents = (exact[0].to(dtype), exact[1].float())
    budget = results(rounded, cotangents, **options)
    moved = {n: None if x is None else x.to(DEVICE) for n, x in rounded.items()}
    got = kernel_results(moved, tuple(c.to(DEVICE) for c in cotangents), known=known, **options)
    assert got.keys() == truth.keys()
    floor = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for name, expected in truth.items():
        result = got[name].cpu()
        allowed = 2 * max(floor, relative(budget[name].to(result.dtype), expected))
        error = relative(result, expected)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
