"""What a call costs on the host, and what of it the card does not hide.

    python -m benchmarks.host                        # 512 tokens, 16 heads of 128
    python -m benchmarks.host --op delta_rule --time 4096 --profile

On a GPU: calls queued one behind the other beside a CUDA graph of the same call, and what a call keeps its caller where
the queue is empty. Gradients are taken twice: as PyTorch does by itself, in a thread of the card's own, and in the
caller's (``torch.autograd.set_multithreading_enabled(False)``). Without a GPU launches go nowhere, and the library's
share of the host's work is what is left; ``nothing`` is an ``autograd.Function`` on the same tensors that does nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import Problem, graphed, medians, ours

OPS = ("gated_delta_rule", "kimi_delta_attention", "gated_linear_attention", "rwkv7", "delta_product")
GPU = torch.cuda.is_available()
clock = time.perf_counter if GPU else time.thread_time  # without a GPU nothing is waited for, and others may run


def draw(problem: Problem) -> dict[str, Tensor]:
    """bfloat16 vectors, float32 coefficients and decays."""
    from parallelflow.testing import Sizes, make_inputs

    sizes = Sizes(*problem[1:7], problem.rank)
    inputs = make_inputs(problem.op, sizes, dtype=torch.float32)
    wide = ("beta", "log_decay")
    device = "cuda" if GPU else "cpu"
    return {
        name: tensor.to(device, torch.float32 if name in wide else torch.bfloat16) for name, tensor in inputs.items()
    }


@contextmanager
def nowhere() -> Iterator[None]:
    """Kernels are launched without a GPU, on tensors of the CPU, and do nothing."""
    from triton.runtime.jit import JITFunction

    from parallelflow import integrate
    from parallelflow.kernels import backend, launch, recording

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    driver = SimpleNamespace(active=active)
    entry = launch.Compiled("".format, (), (), ())  # takes whatever it is given
    stand_ins = [
        (sys.modules[integrate.__module__], "elsewhere", lambda tier, inputs: None),
        (backend, "elsewhere", lambda tier, inputs: None),
        (launch, "driver", driver),
        (recording, "driver", driver),
        (launch, "_entry_point", lambda *_: entry),
        (JITFunction, "run", lambda *_, **__: None),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


class Nothing(torch.autograd.Function):
    """As many tensors in and out as a call has, and as many gradients."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


def least(call: Callable[[], Any], rounds: int = 15, repeats: int = 60) -> float:
    """Microseconds that a call keeps its caller, the least of the rounds' means; the queue is empty as one begins.
    Without a GPU, of the processor."""
    for _ in range(12):
        call()
    times = []
    for _ in range(rounds):
        if GPU:
            torch.cuda.synchronize()
        before = clock()
        for _ in range(repeats):
            call()
        times.append((clock() - before) / repeats * 1e6)
    return min(times)


def calls_of(problem: Problem) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    model = ours(problem, "auto" if GPU else "triton")
    leaves = {name: tensor.requires_grad_() for name, tensor in draw(problem).items()}
    tensors = list(leaves.values())
    cotangent = torch.randn_like(model(**leaves))

    def forward() -> Tensor:
        with torch.no_grad():
            return model(**leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(**leaves), tensors, cotangent)

    def alone() -> tuple[Tensor, ...]:
        with torch.autograd.set_multithreading_enabled(False):
            return both()

    def nothing() -> tuple[Tensor, ...]:
        output = Nothing.apply(*tensors)
        return torch.autograd.grad(output, tensors, output)

    def nothing_alone() -> tuple[Tensor, ...]:
        with torch.autograd.set_multithreading_enabled(False):
            return nothing()

    calls = {
        "forward": forward,
        "forward, recorded": lambda: model(**leaves),
        "both": both,
        "nothing": nothing,
    }
    return calls | ({"both, one thread": alone, "nothing, one thread": nothing_alone} if GPU else {})


def profile(call: Callable[[], Any], count: int = 300, lines: int = 40) -> None:
    """Where the time of the call goes, as the profiler sees it, which makes functions look dearer than they are."""
    for _ in range(20):
        call()
    recorder = cProfile.Profile()
    with recorder:
        for _ in range(count):
            call()
    pstats.Stats(recorder).sort_stats("tottime").print_stats(lines)


def measure(problem: Problem) -> None:
    """One line for each of the calls."""
    print(f"{problem.op} {problem.batch} x {problem.time}, {problem.key_heads}/{problem.value_heads}", flush=True)
    for name, call in calls_of(problem).items():
        text = f"  {name:20} host {least(call):7.1f} us"
        if GPU:
            queued = medians(call) * 1e3
            graph = None if "nothing" in name else graphed(call)
            text += f"   queued {queued:7.1f} us"
            text += "" if graph is None else f"   graph {graph * 1e3:7.1f} us   ratio {queued / graph / 1e3:5.2f}"
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help=f"default: {', '.join(OPS)}")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--time", type=int, default=512)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="channels of a head")
    parser.add_argument("--profile", action="store_true", help="also where the time of forward and backward goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with nullcontext() if GPU else nowhere():
        for op in arguments.op or OPS:
            rank = 2 if op in ("delta_product", "low_rank_flow") else 1
            problem = Problem(op, arguments.batch, arguments.time, *[arguments.heads] * 2, *[arguments.size] * 2, rank)
            measure(problem)
            if arguments.profile:
                for name in ("forward", "both, one thread" if GPU else "both"):
                    print(name)
                    profile(calls_of(problem)[name])


if __name__ == "__main__":
    main()
