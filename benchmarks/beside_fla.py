"""One of FLA's functions beside ours: the same tensors to both, both against float64.

FLA's function and ours get the same tensors of 16 bits (decays and gates float32), and ours the same in float64, which
is the truth. Ours agrees where each of its errors is at most twice the larger of FLA's and of what rounding inputs and
results to their dtypes makes, and FLA's is at most eight times the latter or a hundredth: then both compute the same
thing. Gradients are compared where FLA has them; what FLA does not run, refuses, or makes infinite is said in the row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import report
from parallelflow.compat import fla as ours


class Sizes(NamedTuple):
    """Of all calls; ``packed`` are the lengths' bounds where sequences are packed."""

    batch: int = 2
    time: int = 200
    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 64
    value_dim: int = 64
    packed: tuple[int, ...] = (0, 70, 71, 200)

    def axes(self, kind: str) -> tuple[int, ...]:
        """After batch and time: of a key, a value, a number a head, a number a key channel of every value head."""
        heads = self.value_heads
        found = {"key": (self.key_heads, self.key_dim), "value": (heads, self.value_dim), "head": (heads,)}
        return found.get(kind, (heads, self.key_dim))


SIZES = Sizes()
STEPS = 2  # Householder steps a token
GROUPED = {"q": "key", "k": "key", "v": "value"}
PLAIN = {"q": "channel", "k": "channel", "v": "value"}
LOW_RANK = {**PLAIN, "a": "channel", "b": "channel"}
TENSORS: dict[str, dict[str, str]] = {
    "delta_rule": {**PLAIN, "beta": "head"},
    "gated_delta_rule": {**GROUPED, "g": "head", "beta": "head"},
    "gated_delta_product": {**PLAIN, "g": "head", "beta": "head"},
    "kda": {**GROUPED, "g": "channel", "beta": "head"},
    "gdn2": {**PLAIN, "g": "channel", "b": "channel", "w": "value"},
    "rwkv7": {"r": "channel", "w": "channel", "k": "channel", "v": "value", "a": "channel", "b": "channel"},
    "mul_recurrent_rwkv7": {"r": "channel", "w": "channel", "k": "channel", "v": "value", "kk": "channel",
                            "a": "channel"},
    "dplr_delta_rule": {**LOW_RANK, "gk": "channel"},
    "iplr_delta_rule": LOW_RANK,
    "comba": {**GROUPED, "p": "key", "g": "head", "beta": "head"},
    "gla": {**PLAIN, "g": "channel"},
    "simple_gla": {**PLAIN, "g": "head"},
    "retention": PLAIN,
    "lightning_attn": PLAIN,
    "linear_attn": PLAIN,
}  # fmt: skip


def draw(name: str, sizes: Sizes) -> dict[str, Tensor]:
    """Float64 tensors by the function's letters."""
    kind = name
    for prefix in ("chunk_", "fused_recurrent_", "fused_chunk_", "fused_"):
        kind = kind.removeprefix(prefix)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for letter, axes in TENSORS[kind].items():
        steps = STEPS if kind == "gated_delta_product" and letter in ("k", "v", "beta") else 1
        shape = (sizes.batch, sizes.time * steps, *sizes.axes(axes))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if letter in ("g", "gk") or (letter == "w" and "rwkv7" in kind):
            x = -torch.nn.functional.softplus(x) / 4
        elif letter == "beta" or (letter in "bw" and kind == "gdn2") or (letter == "a" and "mul" in kind):
            x = x.sigmoid()
        elif letter in ("k", "p", "a", "b", "kk"):
            x = x / x.norm(dim=-1, keepdim=True) * (0.5 if letter in "ab" else 1.0)
        if kind == "linear_attn":
            x = x.abs() if letter in "qk" else x
        tensors[letter] = x
    if name == "fused_recurrent_gla":
        tensors["gk"] = tensors.pop("g")
    return tensors


def variants(name: str, sizes: Sizes = SIZES) -> list[dict[str, Any]]:
    """The keyword options to try: the defaults; packed sequences with every switch; the gates inside."""
    takes = inspect.signature(getattr(ours, name)).parameters
    needed: dict[str, Any] = {"layer_idx": 1, "num_layers": 4} if "lightning" in name else {}
    if "product" in name:
        needed["num_householder"] = STEPS
    switches: dict[str, Any] = {
        key: True for key in ("use_qk_l2norm_in_kernel", "reverse", "state_v_first") if key in takes
    }
    if "normalize" in takes:
        switches["normalize"] = not takes["normalize"].default
    found = [needed, {**needed, **switches, "cu_seqlens": list(sizes.packed)}]
    beta = {key: True for key in ("use_beta_sigmoid_in_kernel", "allow_neg_eigval") if key in takes}
    if "use_gate_in_kernel" in takes:
        found.append({**needed, **beta, "use_gate_in_kernel": True})
        if "lower_bound" in takes:
            safe = {"safe_gate": True} if "safe_gate" in takes else {}
            found.append({**needed, "use_gate_in_kernel": True, "lower_bound": -4.0, **safe})
    return found


Results = dict[str, Tensor]


def dtype_of(letter: str, dtype: torch.dtype) -> torch.dtype:
    """Of a function's tensor in a call of this dtype: log-decays and gates keep at least float32."""
    return torch.promote_types(dtype, torch.float32) if letter in ("g", "gk") else dtype


def call(
    function: Callable[..., Any],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    sizes: Sizes,
    dtype: torch.dtype,
    device: str,
) -> tuple[Results, str]:
    """Output, states, gradients (``d letter``) by name; why there are no gradients, where there are none."""
    options = dict(options)
    packed = options.pop("cu_seqlens", None)
    leaves = {}
    for letter, x in tensors.items():
        x = x[:1] if packed is not None else x
        leaves[letter] = x.to(device, dtype_of(letter, dtype)).requires_grad_()
    state_axes = (sizes.key_dim, sizes.value_dim)
    state_axes = state_axes[::-1] if options.get("state_v_first") else state_axes
    shape = (sizes.batch if packed is None else len(packed) - 1, sizes.value_heads, *state_axes)
    generator = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    options["initial_state"] = torch.randn(shape, generator=generator).to(device, wide).requires_grad_()
    if packed is not None:
        options["cu_seqlens"] = torch.tensor(packed, device=device)
    if options.get("use_gate_in_kernel"):
        gate = tensors["g"].shape[2:]
        options["A_log"] = torch.linspace(-1, 0.5, gate[0]).to(device, wide).requires_grad_()
        options["dt_bias"] = torch.linspace(-1, 1, gate.numel()).to(device, wide).requires_grad_()
    output, state = function(**leaves, output_final_state=True, **options)
    states = [x for x in (state if isinstance(state, tuple) else (state,)) if x is not None]
    results: Results = {"output": output, **{f"state {i}": x for i, x in enumerate(states)}}
    inputs: Results = {**leaves, **{n: options[n] for n in ("initial_state", "A_log", "dt_bias") if n in options}}
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results.values()]
    try:
        total = torch.stack([(x * w).sum().double() for x, w in zip(results.values(), weights, strict=True)]).sum()
        gradients = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    except (NotImplementedError, RuntimeError) as error:
        return results, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return results | {f"d {n}": x for n, x in zip(inputs, gradients, strict=True) if x is not None}, ""


def relative(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check(
    name: str,
    options: dict[str, Any],
    theirs: Callable[..., Any],
    sizes: Sizes = SIZES,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> report.Row:
    """One row: the errors of ours and FLA's, of output and states and of the worst gradient, and whether they agree."""
    exact = draw(name, sizes)
    tensors = {letter: x.to(dtype_of(letter, dtype)).double() for letter, x in exact.items()}
    row: report.Row = {"function": name, "options": options}
    truth, _ = call(getattr(ours, name), tensors, options, sizes, torch.float64, device)
    unrounded, _ = call(getattr(ours, name), exact, options, sizes, torch.float64, device)
    mine, missing = call(getattr(ours, name), tensors, options, sizes, dtype, device)
    try:
        reference, why = call(theirs, tensors, options, sizes, dtype, device)
    except Exception as error:  # FLA's own limits: what it does not run there is no comparing with
        message = (str(error).strip() or repr(error)).splitlines()[0]
        return {**row, "agrees": None, "fla": f"{type(error).__name__}: {message}"[:160]}
    agrees = not missing and set(mine) == set(truth) and set(reference) <= set(truth)
    notes = [why] if why else []
    worst = {"forward": -1.0, "gradient": -1.0}
    for key in (key for key in reference if key in truth and key in mine):
        rounding = relative(unrounded[key], truth[key]) + relative(truth[key].to(mine[key].dtype), truth[key])
        mine_off, theirs_off = relative(mine[key], truth[key]), relative(reference[key], truth[key])
        agrees &= mine[key].shape == reference[key].shape
        if key in ("output", "state 0"):
            agrees &= mine[key].dtype == reference[key].dtype
        if math.isfinite(theirs_off):
            allowed = max(theirs_off, rounding)
            agrees &= theirs_off <= max(8 * rounding, 0.01)  # its gradient of A_log sums what is rounded already
        else:
            allowed = rounding
            notes.append(f"{key} is not finite")
        agrees &= mine_off <= 2 * allowed
        part = "gradient" if key.startswith("d ") else "forward"
        if mine_off / allowed > worst[part]:
            worst[part] = mine_off / allowed
            row[part] = {"of": key, "ours": float(f"{mine_off:.2g}"), "fla": float(f"{theirs_off:.2g}")}
    return {**row, "agrees": bool(agrees), **({"fla": "; ".join(notes)[:160]} if notes else {})}
