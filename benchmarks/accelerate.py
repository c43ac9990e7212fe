"""Transformers' linear-attention models as they are, and accelerated: layers and whole models, on this machine's CPU.

    python -m benchmarks.accelerate                    # benchmarks/results/accelerate.json
    python -m benchmarks.accelerate --rounds 3 --only qwen3_next

Random weights, float32, one sequence of 2048 tokens. The two take turns, pair by pair; the medians are reported. A
layer is the attention module alone, with its projections, convolution, gate and norm; a training step is forward and
backward with gradients of weights and inputs; a token is one more after the prompt, with its cache. Widths are an
eighth of the published models', heads half as wide.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks import report
from parallelflow.compat.transformers import accelerate

RESULT = report.RESULTS / "accelerate.json"
COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "num_key_value_heads": 2,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "num_experts": 8,
        "shared_expert_intermediate_size": 64,
    },
    "kimi_linear": {
        "linear_head_dim": 64,
        "linear_num_heads": 4,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "n_group": 1,
        "topk_group": 1,
        "num_local_experts": 8,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "minimax": {"num_local_experts": 8, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1, "chunk_size": 64},
}


def build(name: str) -> nn.Module:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    known = CONFIG_MAPPING[name]
    fields = {**COMMON, **CONFIGURATIONS[name]}
    if name == "mamba2":
        fields = {key: fields[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", *CONFIGURATIONS[name])}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return transformers.AutoModelForCausalLM.from_config(known(**fields, **ids)).eval()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pairs(calls: tuple[Callable[[], Any], Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians of the two in turns, in milliseconds, after one turn that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            value = 1e3 * seconds(call)
            if turn:
                taken.append(value)
    theirs, ours = map(statistics.median, times)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return {"transformers_ms": round(theirs, 2), "parallelflow_ms": round(ours, 2), "ratio": round(ratio, 2)}


def layer_calls(layer: nn.Module, states: Tensor, training: bool) -> Callable[[], Any]:
    extra = {"position_embeddings": None, "attention_mask": None} if "Lightning" in type(layer).__name__ else {}

    def prefill() -> None:
        with torch.no_grad():
            layer(states, **extra)

    def train() -> None:
        leaf = states.detach().requires_grad_()
        output = layer(leaf, **extra)
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
        layer.zero_grad(set_to_none=True)

    return train if training else prefill


def model_calls(model: nn.Module, ids: Tensor, training: bool) -> Callable[[], Any]:
    def prefill() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    def train() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return train if training else prefill


def decoder(model: nn.Module, ids: Tensor) -> Callable[[], Any]:
    """One more token after the prompt; the cache grows, for both the same."""
    with torch.no_grad():
        output = model(ids, use_cache=True)
    argument = "cache_params" if "cache_params" in output else "past_key_values"
    cache = output[argument]

    def token() -> None:
        with torch.no_grad():
            model(ids[:, :1], **{argument: cache}, use_cache=True)

    return token


def measure(name: str, length: int, rounds: int) -> list[report.Row]:
    model = build(name)
    ours = copy.deepcopy(model)
    handle = accelerate(ours)
    path = next(iter(handle.replaced))
    layers = [each.get_submodule(path) for each in (model, ours)]
    states, ids = torch.randn(1, length, COMMON["hidden_size"]), torch.randint(3, 2000, (1, length))
    with torch.no_grad():
        expected, got = model(ids, use_cache=False).logits, ours(ids, use_cache=False).logits
    difference = ((got - expected).norm() / expected.norm()).item()
    rows = []
    for part, kind, calls in (
        ("layer", "prefill", [layer_calls(each, states, False) for each in layers]),
        ("layer", "training step", [layer_calls(each, states, True) for each in layers]),
        ("model", "prefill", [model_calls(each, ids, False) for each in (model, ours)]),
        ("model", "training step", [model_calls(each, ids, True) for each in (model, ours)]),
        ("model", "token", [decoder(each, ids) for each in (model, ours)]),
    ):
        found = pairs((calls[0], calls[1]), rounds * 10 if kind == "token" else rounds)
        row = {"model": name, "part": part, "kind": kind, "time": length, **found, "difference": difference}
        print(f"{name:12} {part} {kind:14} {found}", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=CONFIGURATIONS, help="one model; the others' results stay as they are")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    names = [arguments.only] if arguments.only else list(CONFIGURATIONS)
    kept = [row for row in report.load(RESULT)["rows"] if row["model"] not in names]
    rows = [row for name in names for row in measure(name, arguments.length, arguments.rounds)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    head = {"kind": "accelerate", "threads": arguments.threads, "cores": os.cpu_count(), "versions": versions}
    report.save({**head, "commit": commit, "rows": [*kept, *rows]}, RESULT)


if __name__ == "__main__":
    main()
