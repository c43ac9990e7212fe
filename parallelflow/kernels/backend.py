"""Which problems the kernels serve, and those problems in the kernels' terms.

A kernel serves rows, not models: any rows, up to 16 a token, on a CPU (``cpu``) and on a GPU (``triton``). On a GPU one
row a token with no or scalar decay, read decayed, either tied (``-β k`` reads, ``k`` writes ``β v``) or only writing,
has kernels of its own, the delta rule's. Both have scans for Hopper (``hopper``). Everything else is the torch
backend's.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from parallelflow.kernels.cpu import build, flow
from parallelflow.problem import Inputs, Traits, sizes_of

SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 512
MOST_ROWS = flow.MOST_ROWS  # a token
TIED = ("query", "write", "value", "value_coefficient", "log_decay", "initial_state")
WRITING = ("query", "lone_write", "lone_value", "lone_coefficient", "log_decay", "initial_state")
"""What the delta rule's kernels are given, in their order."""
ROWS_OF = {"triton": "rows", "hopper": "hopper_rows"}


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a hook of the import system that forbids it
        return False


TRITON = _is_there("triton")  # once: looking for it in a call would break a compiled graph


def refusal(tier: str, inputs: Inputs, traits: Traits) -> str | None:
    """Why a tier of the kernels cannot take this problem; None where it can."""
    why = elsewhere(tier, inputs) or too_large(inputs) or _too_many(traits)
    if why is None and tier != "cpu" and traits.sequential and traits.positions and traits.lone_positions:
        why = "sequential rows of which some only write, expected simultaneous ones"
    if why is None and tier == "hopper" and not hopper_fits(inputs, traits):
        why = (
            "another GPU, dtype, size or number of rows than compute capability 9, 16 bits, K of 64 or 128, V of 64, "
            "128, …, 1, 2, 4, … rows a token that read and as many that only write"
        )
    return why


def elsewhere(tier: str, inputs: Inputs) -> str | None:
    """Why a tier does not run on this machine, or on these tensors' device."""
    device = inputs.query.device
    if tier == "cpu":
        if device.type != "cpu":
            return f"tensors on {device}, expected the CPU"
        return None if _compiled() else "no compiled library here, expected a C++ compiler on Linux"
    if not TRITON:
        return "no Triton, expected it installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors on {device}, expected a CUDA device"
    return None


def _compiled() -> bool:
    """Whether the CPU's kernels are there; while a graph is traced, whether there is what makes them."""
    return build.COMPILER is not None and (torch.compiler.is_compiling() or build.usable())


def too_large(inputs: Inputs) -> str | None:
    """Why no kernel takes these dtypes or sizes."""
    sizes, query = sizes_of(inputs), inputs.query
    if query.dtype not in SUPPORTED or sizes.compute_dtype != torch.float32:
        return f"dtype {query.dtype} computed in {sizes.compute_dtype}, expected 16 or 32 bits throughout"
    if max(sizes.key_dim, sizes.value_dim) > LARGEST_HEAD:
        return f"K = {sizes.key_dim}, V = {sizes.value_dim}, expected at most {LARGEST_HEAD}"
    return None


def _too_many(traits: Traits) -> str | None:
    """Why no kernel takes so many rows."""
    if traits.rank > MOST_ROWS:
        return f"{traits.rank} rows a token, expected at most {MOST_ROWS}"
    return None


def _beyond_the_delta_rule(inputs: Inputs, traits: Traits) -> str | None:
    """Why these rows are not those of the delta rule's kernels."""
    sizes = sizes_of(inputs)
    if inputs.log_decay is not None and inputs.log_decay.ndim == 4:
        return "a decay a key channel, expected none or one a head"
    if traits.raw:
        return "raw reads, expected decayed ones"
    if traits.rank != 1:
        return f"{traits.rank} rows a token, expected 1"
    if traits.positions and not traits.tied:
        return "a read that is not -β times the write, beside β times the value"
    key, value, coefficient = _factors(inputs)
    if key.shape[2] != sizes.heads or value.shape[2] != sizes.value_heads:
        return "keys or values with other heads than the query's H and HV"
    if not traits.positions and traits.lone_sign != 1:
        return "a negative value"
    if coefficient is not None and (coefficient.ndim != 3 or coefficient.shape[2] != sizes.value_heads):
        return "a coefficient a channel or a key head, expected one a value head"
    return None


def hopper_fits(inputs: Inputs, traits: Traits) -> bool:
    """Whether the scans written for Hopper serve these rows, shapes, dtype and device."""
    if not inputs.query.is_cuda or inputs.query.numel() == 0:
        return False
    if torch.cuda.get_device_capability(inputs.query.device)[0] != 9:
        return False
    if _beyond_the_delta_rule(inputs, traits) is not None:
        from parallelflow.kernels.hopper import rows_scan
        from parallelflow.kernels.rows.layout import Layout

        return rows_scan.fits(Layout.of(inputs, traits), inputs.query)
    from parallelflow.kernels import schedule
    from parallelflow.kernels.hopper import scan

    _, value, _ = _factors(inputs)
    return scan.fits(inputs.query, value, schedule.chunks_of(inputs.query, value, None, None))


def fastest(inputs: Inputs, traits: Traits) -> str:
    """The fastest backend where these tensors are.

    On a CPU the compiled kernels, where they can be compiled. On a GPU Hopper's tier where it fits; else the portable
    one, which was faster than the torch backend at every shape measured, where it was tried: on NVIDIA GPUs with TF32
    tensor cores.
    """
    device = inputs.query.device
    if not inputs.query.numel():
        return "torch"
    if device.type == "cpu":
        return "cpu" if _compiled() else "torch"
    if device.type != "cuda" or not TRITON:
        return "torch"
    if hopper_fits(inputs, traits):
        return "hopper"
    tried = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return "triton" if tried else "torch"


def kernels_of(tier: str, inputs: Inputs, traits: Traits) -> str:
    """What runs of a tier that takes this problem: ``rows`` or ``hopper_rows``, the kernels of rows of every kind with
    the portable scan or Hopper's, where those of the delta rule do not do; else the tier. As it follows from shapes and
    structure, it is decided once."""
    if tier not in ROWS_OF or _beyond_the_delta_rule(inputs, traits) is None:
        return tier
    return ROWS_OF[tier]


def forward(
    inputs: Inputs,
    traits: Traits,
    sequence_starts: list[int] | None,
    tier: str,
    keep: bool,
    batch_invariant: bool = True,
    need_final_state: bool = True,
    unrounded: bool = False,
    decided: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Output, final states (if needed) and, if ``keep``, what the backward pass needs not compute again; ``tier`` as
    of ``kernels_of``. ``unrounded``: the output in float32, on a CPU. ``decided``: see ``autograd.Setting``."""
    if tier == "cpu":
        return flow.forward(inputs, traits, sequence_starts, keep, unrounded)
    if tier in ROWS_OF.values():
        return _kernels("rows.passes").forward(
            inputs, traits, sequence_starts, tier, keep, need_final_state, batch_invariant, decided
        )
    options = _options(inputs, traits, sequence_starts, tier, batch_invariant)
    if decided is not None and inputs.single():  # what has an R axis has results of another shape
        slots = [Inputs._fields.index(name) for name in (TIED if traits.positions else WRITING)]
        decided["slots"] = slots, slots
    return _kernels("delta").forward(
        *_arguments(inputs), **options, need_final_state=need_final_state, save_for_backward=keep, decided=decided
    )


def widened(inputs: Inputs, traits: Traits, tier: str, keep: bool) -> tuple[Tensor, Tensor, list[Tensor]] | None:
    """``forward`` of a regular batch whose initial states may have more channels than its values, those beyond being 0,
    and what the backward pass of the same tokens needs, whatever their initial states; None of a tier that has no way
    of its own to do it."""
    return _kernels("rows.engine").widened(inputs, traits, tier, keep) if tier in ROWS_OF.values() else None


def add_read(output: Tensor, queries: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor | None] | None:
    """``output + S^T y`` of every token, rounded once, and, if ``keep``, the queries y without what lies between them
    (``read.add_read``); None where no kernel does it."""
    if not TRITON or not output.is_cuda or output.dtype not in SUPPORTED or state.dtype != torch.float32:
        return None
    return _kernels("read").add_read(output, queries, state, keep)


def begin(inputs: Inputs, traits: Traits, tier: str) -> Any:
    """The first half of ``forward`` on a regular batch whose initial states are not known yet (``halves.Half``), which
    ``finish`` finishes; None of a tier whose passes do not come in halves."""
    if tier not in ("triton", "hopper"):
        return None
    return _kernels("halves").begin(*_arguments(inputs), **_of_halves(inputs, traits, tier))


def finish(half: Any, initial_state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and what the backward pass needs not compute again."""
    return _kernels("halves").finish(half, initial_state)


def pull(inputs: Inputs, traits: Traits, tier: str, saved: list[Tensor], flows: Tensor, d_output: Tensor) -> Tensor:
    """The gradient of the initial states ``[B, HV, K, V]``, as far as it reaches the output."""
    options = _of_halves(inputs, traits, tier)
    return _kernels("halves").pull(*_arguments(inputs), saved[0], flows, d_output, **options)


def _of_halves(inputs: Inputs, traits: Traits, tier: str) -> dict:
    options = _options(inputs, traits, None, tier, True)
    return {name: options[name] for name in ("tied", "scale", "tier")}


def step(inputs: Inputs, traits: Traits) -> tuple[Tensor, Tensor]:
    """One token (T = 1) on a CPU: output and state."""
    return flow.step(inputs, traits)


def backward(
    inputs: Inputs,
    traits: Traits,
    sequence_starts: list[int] | None,
    tier: str,
    saved: list[Tensor],
    d_output: Tensor,
    d_final: Tensor | None,
    batch_invariant: bool = True,
    decided: dict[Any, Any] | None = None,
) -> Inputs:
    """Gradients of all inputs, each in its dtype; what is tied stands in two slots, of which one has it all."""
    if tier == "cpu":
        return flow.backward(inputs, traits, sequence_starts, saved, d_output, d_final)
    if tier in ROWS_OF.values():
        rows = _kernels("rows.passes")
        return rows.backward(inputs, traits, sequence_starts, tier, saved, d_output, d_final, batch_invariant, decided)
    options = _options(inputs, traits, sequence_starts, tier, batch_invariant)
    found = _kernels("delta").backward(
        *_arguments(inputs), saved, d_output, None if d_final is None else d_final.float(), **options, decided=decided
    )
    d_query, d_key, d_value, d_coefficient, d_log_decay, d_initial = found
    gradients = Inputs(d_query, log_decay=d_log_decay, initial_state=d_initial)
    if traits.positions:
        gradients = gradients._replace(write=d_key, value=d_value, read_coefficient=d_coefficient)
    else:
        gradients = gradients._replace(lone_write=d_key, lone_value=d_value, lone_coefficient=d_coefficient)
    return gradients if inputs.single() else gradients.stacked()


@cache
def _kernels(module: str) -> Any:
    """A module that has a forward and a backward on a GPU."""
    return importlib.import_module(f"parallelflow.kernels.{module}")


def _factors(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """The row's key, value and coefficient, without R axis."""
    key, value, coefficient = inputs.write, inputs.value, inputs.value_coefficient
    if key is None:
        key, value, coefficient = inputs.lone_write, inputs.lone_value, inputs.lone_coefficient
    assert key is not None
    assert value is not None
    if key.ndim == 4:
        return key, value, coefficient
    return key.squeeze(2), value.squeeze(2), None if coefficient is None else coefficient.squeeze(2)


def _arguments(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    return inputs.query, *_factors(inputs), inputs.log_decay


def _options(
    inputs: Inputs, traits: Traits, sequence_starts: list[int] | None, tier: str, batch_invariant: bool
) -> dict:
    return {
        "tied": bool(traits.positions),
        "scale": inputs.query.shape[3] ** -0.5 if traits.scale is None else traits.scale,
        "initial_state": inputs.initial_state,
        "sequence_starts": None if sequence_starts is None else tuple(sequence_starts),
        "tier": tier,
        "batch_invariant": batch_invariant,
    }
