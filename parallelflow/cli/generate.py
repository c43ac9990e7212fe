"""`parallelflow generate`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from parallelflow.cli.train import chosen_device, extra_needed


def generate(
    run: Annotated[Path, typer.Argument(help="The folder that `parallelflow train` wrote.")],
    prompt: Annotated[str, typer.Option(help="What to go on from.")] = "\n",
    tokens: Annotated[int, typer.Option(min=1, help="How many to generate.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the tokens that are drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; auto takes a GPU where there is one.")] = "auto",
) -> None:
    """Continue a prompt with a trained model, token by token, at a constant cost for each."""
    extra_needed()
    from transformers.utils.logging import disable_progress_bar

    from parallelflow.models import ParallelFlowForCausalLM
    from parallelflow.training import CheckpointError, latest, open_tokens

    try:
        if not math.isfinite(temperature):
            raise ValueError(f"temperature: got {temperature}, expected a finite number")
        place = chosen_device(device)
        found = latest(run / "checkpoints", lambda why: typer.echo(f"not used: {why}", err=True))
        file = run / "tokenizer.json"
        vocabulary = open_tokens(None if found.tokens == "bytes" else file)
        if vocabulary.name != found.tokens:
            raise ValueError(f"tokenizer: {file} is not the one that {found.folder} was trained with")
        start = vocabulary.encode(prompt)
        if not start:
            raise ValueError(f"prompt: got {prompt!r}, which has no tokens, expected at least one")
    except (ValueError, CheckpointError, OSError) as error:
        typer.echo(f"parallelflow generate: {error}", err=True)
        raise typer.Exit(2) from None
    disable_progress_bar()
    model = ParallelFlowForCausalLM.from_pretrained(found.folder).eval()
    torch.nn.Module.to(model, place)
    say = vocabulary.decoder()
    typer.echo(prompt, nl=False)
    for token in continued(model, torch.tensor([start], device=place), tokens, temperature, seed):
        typer.echo(printable(say(token)), nl=False)
    typer.echo()


@torch.inference_mode()
def continued(model: Any, prompt: Tensor, count: int, temperature: float, seed: int) -> Iterator[int]:
    """``count`` tokens after the prompt ``[1, T]``."""
    generator = torch.Generator().manual_seed(seed)
    seen, cache = prompt, None
    for _ in range(count):
        result = model(seen, past_key_values=cache, use_cache=True)
        logits, cache = result.logits[0, -1].float().cpu(), result.past_key_values
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(((logits - logits.max()) / temperature).softmax(-1), 1, generator=generator))
        yield token
        seen = torch.tensor([[token]], device=prompt.device)


def printable(text: str) -> str:
    """Text that cannot disturb a terminal: a dot for every control character but line ends and tabs."""
    return "".join(x if x.isprintable() or x in "\n\t" else "·" for x in text)
