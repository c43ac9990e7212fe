"""The decay of Mamba-2, which Gated DeltaNet and its kin took over: ``g = -e^A · softplus(x + b)``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus_decay(raw: Tensor, log_rate: Tensor, bias: Tensor) -> Tensor:
    """``-e^log_rate · softplus(raw + bias)``, a log-decay ≤ 0, in at least float32; shapes broadcast."""
    wide = torch.promote_types(raw.dtype, torch.float32)
    return -log_rate.to(wide).exp() * F.softplus(raw.to(wide) + bias.to(wide))


def initial_log_rates(count: int, low: float, high: float) -> Tensor:
    """``log A`` of A uniform in ``[low, high)``, one a head.

    A = 0 would be a head whose rate has no finite logarithm: ``low`` is raised to 1e-4.
    """
    return torch.empty(count).uniform_(max(low, 1e-4), high).log()


def initial_step_biases(count: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """The b for which ``softplus(b)`` is log-uniform in ``[low, high)``, and at least ``floor``.

    Source: Mamba, Gu and Dao 2023, arXiv 2312.00752, section 3.6.
    """
    step = torch.exp(torch.rand(count) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return step + torch.log(-torch.expm1(-step))
