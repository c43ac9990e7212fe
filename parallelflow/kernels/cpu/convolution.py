"""The short causal convolution of each channel, with SiLU after it or not, on a CPU: forward and backward.

    y_t = f(b + Σ_i w_i ⊙ x_{t - W + 1 + i})

One pass over the tokens each way; the backward pass computes what SiLU was given again, and keeps nothing.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from parallelflow.kernels.cpu.build import library

WIDTHS = (2, 3, 4)
_POINTERS = ("inputs", "window", "weight", "bias", "output", "d_output", "d_inputs", "d_weight", "d_bias")
_NUMBERS = ("batch_stride", "time_stride", "batch", "time", "channels", "width", "silu", "threads")


class _Call(ctypes.Structure):
    """``struct Convolution`` of source/convolution.h, field by field."""

    _fields_ = [*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_long) for name in _NUMBERS)]


@cache
def lanes() -> int:
    """What the number of channels must be a multiple of."""
    return library().parallelflow_lanes()


def _run(inputs: Tensor, window: Tensor, silu: bool, tensors: dict[str, Tensor | None]) -> None:
    """``inputs [B, T, C]`` at any strides but the last, ``window [B, W - 1, C]``, ``weight [W, C]``, in float32."""
    given = {"inputs": inputs, "window": window, **tensors}
    call = _Call(**{name: None if tensor is None else tensor.data_ptr() for name, tensor in given.items()})
    call.batch, call.time, call.channels = inputs.shape
    call.batch_stride, call.time_stride = inputs.stride()[:2]
    call.width, call.silu, call.threads = window.shape[1] + 1, silu, torch.get_num_threads()
    if library().parallelflow_convolution(ctypes.byref(call)):
        raise ValueError(f"weight: got width {call.width}, expected one of {WIDTHS}")


class Convolution(torch.autograd.Function):
    """``(inputs [B, T, C], window [B, W - 1, C], weight [C, W], bias [C] or None, silu, plain) -> y [B, T, C]``.

    ``plain(inputs, window, weight, bias)`` is the same in tensor algebra: what gradients of gradients are taken of. The
    window gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, plain: Any
    ) -> Tensor:
        ctx.save_for_backward(inputs, window, weight, bias)
        ctx.silu, ctx.plain = silu, plain
        output = inputs.new_empty(inputs.shape)
        taps = weight.t().contiguous()
        _run(inputs, window, silu, {"weight": taps, "bias": bias, "output": output})
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d_output,) = gradients
        inputs, window, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of these gradients are wanted
            wanted = [tensor for tensor in (inputs, weight, bias) if tensor is not None and tensor.requires_grad]
            again = ctx.plain(inputs, window, weight, bias)
            found = dict(zip(wanted, torch.autograd.grad(again, wanted, d_output, create_graph=True), strict=True))
            return found.get(inputs), None, found.get(weight), None if bias is None else found.get(bias), None, None
        batch, _, channels = inputs.shape
        d_inputs = inputs.new_empty(inputs.shape)
        d_weight, d_bias = inputs.new_empty(batch, weight.shape[1], channels), inputs.new_empty(batch, channels)
        tensors = {"weight": weight.t().contiguous(), "bias": bias, "d_output": d_output.contiguous()}
        _run(inputs, window, ctx.silu, {**tensors, "d_inputs": d_inputs, "d_weight": d_weight, "d_bias": d_bias})
        return d_inputs, None, d_weight.sum(0).t(), None if bias is None else d_bias.sum(0), None, None
