"""compat.fla beside FLA itself, on a GPU where both are installed: outputs, states, gradients and signatures.

    python -m benchmarks.check_fla                          # all functions, small sizes; exit status 1 if any differs
    python -m benchmarks.check_fla chunk_kda chunk_comba    # some: FLA tunes itself for a minute or two a function

FLA's function and ours get the same bfloat16 tensors, and ours the same in float64, which is the truth. Ours passes
where its error is at most twice the larger of FLA's and of what rounding the result to its dtype makes. Gradients are
compared where FLA has them. Where FLA does not run a function (its own errors), the line says so.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallelflow.compat import fla as ours

B, T, H, HV, K, V, STEPS = 2, 200, 2, 4, 64, 64, 2
KEY, VALUE, HEAD, CHANNEL = (H, K), (HV, V), (HV,), (HV, K)
GROUPED = {"q": KEY, "k": KEY, "v": VALUE}
PLAIN = {"q": CHANNEL, "k": CHANNEL, "v": VALUE}
LOW_RANK = {**PLAIN, "a": CHANNEL, "b": CHANNEL}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "delta_rule": {**PLAIN, "beta": HEAD},
    "gated_delta_rule": {**GROUPED, "g": HEAD, "beta": HEAD},
    "gdn": {**GROUPED, "g": HEAD, "beta": HEAD},
    "gated_delta_product": {**PLAIN, "g": HEAD, "beta": HEAD},
    "kda": {**GROUPED, "g": CHANNEL, "beta": HEAD},
    "gdn2": {**PLAIN, "g": CHANNEL, "b": CHANNEL, "w": VALUE},
    "rwkv7": {"r": CHANNEL, "w": CHANNEL, "k": CHANNEL, "v": VALUE, "a": CHANNEL, "b": CHANNEL},
    "mul_recurrent_rwkv7": {"r": CHANNEL, "w": CHANNEL, "k": CHANNEL, "v": VALUE, "kk": CHANNEL, "a": CHANNEL},
    "dplr_delta_rule": {**LOW_RANK, "gk": CHANNEL},
    "iplr_delta_rule": LOW_RANK,
    "comba": {**GROUPED, "p": KEY, "g": HEAD, "beta": HEAD},
    "gla": {**PLAIN, "g": CHANNEL},
    "simple_gla": {**PLAIN, "g": HEAD},
    "retention": PLAIN,
    "lightning_attn": PLAIN,
    "linear_attn": PLAIN,
}


def draw(name: str) -> dict[str, Tensor]:
    """Float64 tensors that bfloat16 holds exactly, by the function's letters."""
    family = (
        name.removeprefix("chunk_").removeprefix("fused_recurrent_").removeprefix("fused_chunk_").removeprefix("fused_")
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for letter, axes in SHAPES[family].items():
        length = T * STEPS if family == "gated_delta_product" and letter in ("k", "v", "beta") else T
        x = torch.randn(B, length, *axes, generator=generator, dtype=torch.float64)
        if letter in ("g", "gk") or (letter == "w" and "rwkv7" in family):
            x = -torch.nn.functional.softplus(x) / 4
        elif letter == "beta" or (letter in "bw" and family == "gdn2") or (letter == "a" and "mul" in family):
            x = x.sigmoid()
        elif letter in ("k", "p", "a", "b", "kk"):
            x = x / x.norm(dim=-1, keepdim=True) * (0.5 if letter in "ab" else 1.0)
        if "linear_attn" in name:
            x = x.abs() if letter in "qk" else x
        tensors[letter] = x.bfloat16().double()
    if name == "fused_recurrent_gla":
        tensors["gk"] = tensors.pop("g")
    return tensors


def variants(name: str) -> list[dict[str, Any]]:
    """The keyword options to try: the defaults, the function's switches, packed sequences, gates inside."""
    takes = inspect.signature(getattr(ours, name)).parameters
    needed: dict[str, Any] = {"layer_idx": 1, "num_layers": 4} if "lightning" in name else {}
    needed |= {"num_householder": STEPS} if "product" in name else {}
    found = [needed]
    switches = {key: True for key in ("use_qk_l2norm_in_kernel", "reverse", "state_v_first") if key in takes}
    if switches:
        found.append({**needed, **switches})
    found.append({**needed, "cu_seqlens": [0, 70, 71, T]})
    if "use_beta_sigmoid_in_kernel" in takes:
        found.append({**needed, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True})
    if "use_gate_in_kernel" in takes:
        found.append({**needed, "use_gate_in_kernel": True})
        if "lower_bound" in takes:
            safe = {"safe_gate": True} if "safe_gate" in takes else {}
            found.append({**needed, "use_gate_in_kernel": True, "lower_bound": -4.0, **safe})
    return found


def call(function: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype) -> Any:
    """Output, states, and the gradients of the tensors (None where there are none)."""
    options = dict(options)
    packed = options.pop("cu_seqlens", None)
    leaves = {}
    for letter, x in tensors.items():
        x = x[:1] if packed is not None else x
        kept = torch.float32 if letter in ("g", "gk") and dtype == torch.bfloat16 else dtype
        leaves[letter] = x.to("cuda", kept).requires_grad_()
    sequences = B if packed is None else len(packed) - 1
    heads, key_dim = HV, K
    shape = (sequences, heads, V, key_dim) if options.get("state_v_first") else (sequences, heads, key_dim, V)
    generator = torch.Generator().manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options["initial_state"] = torch.randn(shape, generator=generator).to("cuda", wide).requires_grad_()
    if packed is not None:
        options["cu_seqlens"] = torch.tensor(packed, device="cuda")
    if options.get("use_gate_in_kernel"):
        gate = tensors["g"].shape[2:]
        options["A_log"] = torch.linspace(-1, 0.5, gate[0]).to("cuda", wide).requires_grad_()
        options["dt_bias"] = torch.linspace(-1, 1, gate.numel()).to("cuda", wide).requires_grad_()
    output, state = function(**leaves, output_final_state=True, **options)
    states = [x for x in (state if isinstance(state, tuple) else (state,)) if x is not None]
    inputs = [*leaves.values(), options["initial_state"], *(options[n] for n in ("A_log", "dt_bias") if n in options)]
    names = [*leaves, "initial_state", *(n for n in ("A_log", "dt_bias") if n in options)]
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in (output, *states)]
    results = {"output": output, **{f"state {i}": x for i, x in enumerate(states)}}
    try:
        total = sum((x * w).sum().double() for x, w in zip((output, *states), weights, strict=True))
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        results |= {f"d {n}": x for n, x in zip(names, gradients, strict=True) if x is not None}
    except (NotImplementedError, RuntimeError) as error:
        results["no gradient"] = str(error).splitlines()[0][:80]
    return results


def relative(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check(family: str, name: str) -> bool:
    theirs = getattr(importlib.import_module(f"fla.ops.{family}"), name)
    right = True
    parameters = [
        [(p.name, p.default) for p in inspect.signature(f).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for f in (theirs, getattr(ours, name))
    ]
    if parameters[0] != parameters[1]:
        print(f"{name:34} DIFFERENT SIGNATURE {parameters}")
        right = False
    for options in variants(name):
        shown = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
        tensors = draw(name)
        truth = call(getattr(ours, name), tensors, options, torch.float64)
        mine = call(getattr(ours, name), tensors, options, torch.bfloat16)
        try:
            reference = call(theirs, tensors, options, torch.bfloat16)
        except Exception as error:  # FLA's own limits: what it does not run there is no comparing with
            print(f"{name:34} {shown}: FLA raises {type(error).__name__}: {str(error).splitlines()[0][:70]}")
            continue
        worst, where = 0.0, ""
        for key, value in truth.items():
            if key not in reference or isinstance(value, str):
                continue
            rounding = relative(value.to(mine[key].dtype), value)
            ratio = relative(mine[key], value) / max(relative(reference[key], value), rounding, 1e-6)
            if ratio > worst:
                worst, where = (
                    ratio,
                    f"{key}: ours {relative(mine[key], value):.1e}, FLA {relative(reference[key], value):.1e}",
                )
        apart = max(relative(reference[k], v) for k, v in truth.items() if k in reference and not isinstance(v, str))
        verdict = "ok" if worst <= 2 and apart < 0.1 else "DIFFERENT"
        right &= verdict == "ok"
        note = f" ({reference['no gradient']})" if "no gradient" in reference else ""
        print(f"{name:34} {shown}: {verdict}, worst {where}, FLA's farthest {apart:.1e}{note}", flush=True)
    return right


def main() -> int:
    if not torch.cuda.is_available():
        print("needs a CUDA device, with flash-linear-attention installed")
        return 2
    only = sys.argv[1:]
    names = [(family, name) for family, each in ours.FAMILIES.items() for name in each if not only or name in only]
    results = [check(family, name) for family, name in names]
    print(f"{sum(results)} of {len(results)} functions agree")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
