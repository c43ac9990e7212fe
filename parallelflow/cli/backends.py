"""Which backend a model takes, and why not another: the engine is asked, nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parallelflow import functional


def tiers(device: torch.device) -> tuple[str, ...]:
    """The kernels that ``auto`` tries on a device, the fastest first."""
    if device.type == "cpu":
        return ("cpu",)
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return ()
    return ("hopper", "triton")


@torch.no_grad()
def refusal_of(model: str, backend: str, inputs: Mapping[str, Tensor]) -> str | None:
    """Why the backend does not take `functional.<model>` of these tensors; None where it does."""
    try:
        getattr(functional, model)(**inputs, backend=backend)
    except ValueError as error:
        prefix = f"backend: got {backend!r} with "
        if not str(error).startswith(prefix):
            raise
        return str(error).removeprefix(prefix)
    return None


def backend_of(model: str, inputs: Mapping[str, Tensor]) -> str:
    """The backend that ``auto`` takes."""
    found = (name for name in tiers(inputs["query"].device) if refusal_of(model, name, inputs) is None)
    return next(found, "torch")
