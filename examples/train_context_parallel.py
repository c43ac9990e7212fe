"""One sequence over several processes: the language model of `train_lm.py`, trained context-parallel.

    torchrun --nproc-per-node 4 examples/train_context_parallel.py --output runs/context
    torchrun --nproc-per-node 2 examples/train_context_parallel.py --output runs/context     # goes on, on two

Each process has a quarter of every sequence; the loss is that of one process (run it without torchrun). On GPUs, one a
process, the same lines run over NCCL.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from parallelflow.training import Bytes, Recipe, open_text, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("runs/context"), help="checkpoints and log; gone on with")
parser.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "README.md", help="a file or a folder")
parser.add_argument("--length", type=int, default=256, help="tokens of a sequence, over all processes")
parser.add_argument("--steps", type=int, default=60)
arguments = parser.parse_args()

recipe = Recipe(
    model={
        "hidden_size": 64, "num_hidden_layers": 2, "layers": ["gated_delta_net", "kimi_delta_attention"],
        "num_heads": 2, "intermediate_size": 128,
    },
    length=arguments.length, batch=4, steps=arguments.steps, warmup=10, evaluate_every=20, evaluation_batches=4,
    checkpoint_every=20,
)  # fmt: skip
text = open_text(arguments.data, Bytes(), recipe, arguments.output / "tokens")

group, rank, device = None, 0, torch.device("cpu")
if "RANK" in os.environ:  # set by torchrun
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    group, rank = dist.group.WORLD, dist.get_rank()


def say(entry):
    if "held_out_loss" in entry:
        print(f"step {entry['step']}: loss {entry['loss']:.4f}, held out {entry['held_out_loss']:.4f}", flush=True)


train(recipe, text, arguments.output, device=device, resume=True, context_group=group, report=say)
if group is not None:
    dist.barrier()
    dist.destroy_process_group()
