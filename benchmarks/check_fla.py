"""compat.fla beside FLA itself on one GPU: the outputs, states and gradients of every function, both against float64.

    python -m benchmarks.check_fla                          # benchmarks/results/compat_<card>.json; 1 if any differs
    python -m benchmarks.check_fla chunk_kda chunk_comba    # some; the others' rows stay as they are

FLA's function and ours get the same bfloat16 tensors (decays and gates float32), and ours the same in float64, which is
the truth. Ours agrees where each of its errors is at most twice the larger of FLA's and of what rounding inputs and
results to their dtypes makes, and FLA's is below a tenth: then both compute the same thing. Gradients are compared
where FLA has them. FLA would tune itself for a minute or two a function; here a rule takes the place of its timings. It
chooses a launch configuration among FLA's own, which changes no result. Each function runs in a process of its own,
many at once, and its rows are written as they come.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from parallelflow.compat import fla as ours

B, T, H, HV, K, V, STEPS = 2, 200, 2, 4, 64, 64, 2
KEY, VALUE, HEAD, CHANNEL = (H, K), (HV, V), (HV,), (HV, K)
Shapes = dict[str, tuple[int, ...]]
GROUPED: Shapes = {"q": KEY, "k": KEY, "v": VALUE}
PLAIN: Shapes = {"q": CHANNEL, "k": CHANNEL, "v": VALUE}
LOW_RANK: Shapes = {**PLAIN, "a": CHANNEL, "b": CHANNEL}
SHAPES: dict[str, Shapes] = {
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
ALIASES = ("chunk_gdn", "fused_recurrent_gdn")  # other names of the same function, in FLA as here
NAMES = {
    name: family
    for start in ("chunk", "fused")  # the chunked forms first: the recurrent ones find their kernels compiled
    for family, names in ours.FAMILIES.items()
    for name in names
    if name.startswith(start) and name not in ALIASES
}


def draw(name: str) -> dict[str, Tensor]:
    """Float64 tensors by the function's letters."""
    kind = name
    for prefix in ("chunk_", "fused_recurrent_", "fused_chunk_", "fused_"):
        kind = kind.removeprefix(prefix)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for letter, axes in SHAPES[kind].items():
        length = T * STEPS if kind == "gated_delta_product" and letter in ("k", "v", "beta") else T
        x = torch.randn(B, length, *axes, generator=generator, dtype=torch.float64)
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


def variants(name: str) -> list[dict[str, Any]]:
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
    found = [needed, {**needed, **switches, "cu_seqlens": [0, 70, 71, T]}]
    beta = {key: True for key in ("use_beta_sigmoid_in_kernel", "allow_neg_eigval") if key in takes}
    if "use_gate_in_kernel" in takes:
        found.append({**needed, **beta, "use_gate_in_kernel": True})
        if "lower_bound" in takes:
            safe = {"safe_gate": True} if "safe_gate" in takes else {}
            found.append({**needed, "use_gate_in_kernel": True, "lower_bound": -4.0, **safe})
    return found


Results = dict[str, Tensor]


def dtype_of(letter: str) -> torch.dtype:
    return torch.float32 if letter in ("g", "gk") else torch.bfloat16


def call(
    function: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype, device: str
) -> tuple[Results, str]:
    """Output, states, gradients (``d letter``) by name; why there are no gradients, where there are none."""
    options = dict(options)
    packed = options.pop("cu_seqlens", None)
    leaves = {}
    for letter, x in tensors.items():
        x = x[:1] if packed is not None else x
        leaves[letter] = x.to(device, dtype_of(letter) if dtype == torch.bfloat16 else dtype).requires_grad_()
    sequences = B if packed is None else len(packed) - 1
    shape = (sequences, HV, V, K) if options.get("state_v_first") else (sequences, HV, K, V)
    generator = torch.Generator().manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options["initial_state"] = torch.randn(shape, generator=generator).to(device, wide).requires_grad_()
    if packed is not None:
        options["cu_seqlens"] = torch.tensor(packed, device=device)
    if options.get("use_gate_in_kernel"):
        gate = tensors["g"].shape[2:]
        options["A_log"] = torch.linspace(-1, 0.5, gate[0]).to(device, wide).requires_grad_()
        options["dt_bias"] = torch.linspace(-1, 1, gate.numel()).to(device, wide).requires_grad_()
    output, state = function(**leaves, output_final_state=True, **options)
    states = [x for x in (state if isinstance(state, tuple) else (state,)) if x is not None]
    results = {"output": output, **{f"state {i}": x for i, x in enumerate(states)}}
    inputs = {**leaves, **{n: options[n] for n in ("initial_state", "A_log", "dt_bias") if n in options}}
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results.values()]
    try:
        total = sum((x * w).sum().double() for x, w in zip(results.values(), weights, strict=True))
        gradients = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    except (NotImplementedError, RuntimeError) as error:
        return results, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return results | {f"d {n}": x for n, x in zip(inputs, gradients, strict=True) if x is not None}, ""


def relative(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check(name: str, options: dict[str, Any], theirs: Callable[..., Any], device: str = "cuda") -> report.Row:
    """One row: the errors of ours and FLA's, of output and states and of the worst gradient, and whether they agree."""
    exact = draw(name)
    tensors = {letter: x.to(dtype_of(letter)).double() for letter, x in exact.items()}
    row: report.Row = {"function": name, "options": options}
    truth, _ = call(getattr(ours, name), tensors, options, torch.float64, device)
    unrounded, _ = call(getattr(ours, name), exact, options, torch.float64, device)
    mine, missing = call(getattr(ours, name), tensors, options, torch.bfloat16, device)
    try:
        reference, why = call(theirs, tensors, options, torch.bfloat16, device)
    except Exception as error:  # FLA's own limits: what it does not run there is no comparing with
        message = (str(error).strip() or repr(error)).splitlines()[0]
        return {**row, "agrees": None, "fla": f"{type(error).__name__}: {message}"[:160]}
    agrees = not missing and set(reference) <= set(truth) and set(mine) == set(truth)
    for part, chosen in (("forward", lambda key: not key.startswith("d ")), ("gradient", lambda key: key[:2] == "d ")):
        worst = -1.0
        for key in (key for key in reference if chosen(key) and key in truth and key in mine):
            rounding = relative(unrounded[key], truth[key]) + relative(truth[key].to(mine[key].dtype), truth[key])
            errors = relative(mine[key], truth[key]), relative(reference[key], truth[key])
            agrees &= mine[key].shape == reference[key].shape and errors[1] < 0.1
            agrees &= errors[0] <= 2 * max(errors[1], rounding)
            if key in ("output", "state 0"):
                agrees &= mine[key].dtype == reference[key].dtype
            if errors[0] / max(errors[1], rounding) > worst:
                worst = errors[0] / max(errors[1], rounding)
                row[part] = {"of": key, "ours": float(f"{errors[0]:.2g}"), "fla": float(f"{errors[1]:.2g}")}
    return {**row, "agrees": bool(agrees), **({"fla": why[:160]} if why else {})}


def without_tuning() -> None:
    """Triton's autotuner takes the configuration nearest four warps, of the fewest stages and smallest tiles."""
    from triton.runtime.autotuner import Autotuner

    def rank(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        tiles = sum(size for size in config.kwargs.values() if isinstance(size, int))
        return [abs(config.num_warps - 4) * 1e6 + config.num_stages * 1e4 + tiles] * 3

    Autotuner._bench = rank


def worker(name: str, path: Path) -> None:
    """The rows of one function, a line each."""
    without_tuning()
    theirs = getattr(importlib.import_module(f"fla.ops.{NAMES[name]}"), name)
    with path.open("a") as file:
        for options in variants(name):
            print(json.dumps(check(name, options, theirs)), file=file, flush=True)


def run(names: list[str], patience: float, at_once: int, found: Callable[[list[report.Row]], None]) -> None:
    """Workers, ``at_once`` side by side; ``found`` gets the rows of each that has ended, or was too slow."""
    until = time.monotonic() + patience
    waiting = list(names)
    running: dict[str, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            late = time.monotonic() > until
            while waiting and len(running) < at_once and not late:
                name = waiting.pop(0)
                command = [sys.executable, "-m", "benchmarks.check_fla", "--worker", name, folder]
                log = (Path(folder) / f"{name}.log").open("w")
                # what the rule chose must not be taken for a timing by another program
                environment = {**os.environ, "FLA_CACHE_RESULTS": "0", "FLA_FLASH_QLA": "0"}
                running[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=report.ROOT, env=environment)
            for name, process in list(running.items()):
                if process.poll() is None and not late:
                    continue
                process.kill()
                process.wait()
                del running[name]
                lines = (Path(folder) / f"{name}.rows").read_text() if (Path(folder) / f"{name}.rows").exists() else ""
                rows = [json.loads(line) for line in lines.splitlines() if line.endswith("}")]
                found(rows)
                if len(rows) < len(variants(name)):
                    log_lines = (Path(folder) / f"{name}.log").read_text().strip().splitlines()
                    why = "too slow" if late else log_lines[-1] if log_lines else "no row"
                    print(f"{name}: {len(rows)} of {len(variants(name))} rows: {why}", flush=True)
            if late and waiting:
                print(f"too late for {', '.join(waiting)}", flush=True)
                return
            time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="function", help="some functions; all, unless given")
    parser.add_argument("--patience", type=float, default=190, help="seconds for all")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/compat_<card>.json")
    parser.add_argument("--commit", default="", help="the commit that is measured; default: asked of git")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker[0], Path(arguments.worker[1]) / f"{arguments.worker[0]}.rows")
        return 0
    if not torch.cuda.is_available():
        print("needs a CUDA device, with flash-linear-attention installed")
        return 2
    names = arguments.names or list(NAMES)
    card = torch.cuda.get_device_name()
    path = arguments.out or report.RESULTS / f"compat_{card.removeprefix('NVIDIA ').lower().replace(' ', '-')}.json"
    versions = {"PyTorch": str(torch.__version__)}
    versions |= {name: importlib.metadata.version(key) for name, key in (("Triton", "triton"), ("FLA", "fla-core"))}
    kept = [row for row in report.load(path)["rows"] if row["function"] not in names]
    head = {"kind": "compat", "card": card, "versions": versions, "commit": report.commit(arguments.commit)}
    shape = {"batch": B, "time": T, "key_heads": H, "value_heads": HV, "key_dim": K, "value_dim": V}
    rows: list[report.Row] = []

    def found(more: list[report.Row]) -> None:
        rows.extend(more)
        for row in more:
            print(json.dumps(row), flush=True)
        order = [*NAMES]
        report.save({**head, **shape, "rows": sorted(kept + rows, key=lambda row: order.index(row["function"]))}, path)

    run(names, arguments.patience, arguments.at_once, found)
    agreeing = [row for row in rows if row["agrees"]]
    print(f"{len(agreeing)} of {len(rows)} calls agree, {sum(row['agrees'] is None for row in rows)} FLA does not run")
    return 0 if rows and not any(row["agrees"] is False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
