"""Looking back a few tokens: short causal convolutions and the token shift, over sequences side by side or packed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.checks import expect_positive_integer, expect_shape
from parallelflow.problem import may_read


class Line(NamedTuple):
    """Inputs with the last ones before them.

    ``tokens [B, L, C]`` has, for each sequence, its window of ``past`` inputs (zeros where there was nothing) and then
    its own. ``own [M]`` are the places of the latter when sequences are packed; None: all but the first ``past``.
    ``window [N, past, C]`` is what the next call needs.
    """

    tokens: Tensor
    own: Tensor | None
    window: Tensor
    past: int

    @staticmethod
    def of(
        inputs: Tensor,
        past: int,
        window: Tensor | None,
        cu_seqlens: Tensor | None = None,
        context_group: Any = None,
        context_lengths: Sequence[int] | None = None,
    ) -> Line:
        """``inputs [B, T, C]`` after ``window [N, past, C]`` (None: zeros); N is B, or the number of packed sequences.
        Over ranks, sequences that go on from the rank before have that rank's last inputs for a window.

        Raises:
            ValueError: if ``window`` has another shape.
        """
        if context_group is not None:
            from parallelflow.distributed import past_inputs

            inputs, window, cu_seqlens = past_inputs(inputs, past, window, cu_seqlens, context_group, context_lengths)
        batch, time, channels = inputs.shape
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        window = _window(inputs, past, window, sequences)
        if cu_seqlens is None:
            return Line(torch.cat([window, inputs], 1), None, _last(window, inputs), past)
        starts = cu_seqlens.to(torch.int64)
        gaps = past * torch.arange(1, sequences + 1, device=inputs.device)  # windows before a sequence's own tokens
        own = torch.arange(time, device=inputs.device)
        own = own + gaps.repeat_interleave(starts.diff(), output_size=time)
        before = (starts[:-1] + gaps - past)[:, None] + torch.arange(past, device=inputs.device)
        places = torch.cat([before.flatten(), own])
        line = inputs.new_empty(time + sequences * past, channels)
        line = line.index_copy(0, places, torch.cat([window.flatten(0, 1), inputs.squeeze(0)]))
        last = (starts[1:] + gaps - past)[:, None] + torch.arange(past, device=inputs.device)
        return Line(line.unsqueeze(0), own, line[last], past)

    def shifted(self, back: int) -> Tensor:
        """The inputs ``back`` tokens earlier, at every place but the line's first ``past``."""
        stop = self.tokens.shape[1] - back
        return self.tokens[:, self.past - back : stop]

    def at_own(self, values: Tensor) -> Tensor:
        """Of values at every place but the first ``past``, those of the inputs: ``[B, T, C]``."""
        return values if self.own is None else values.index_select(1, self.own - self.past)


def _window(inputs: Tensor, past: int, window: Tensor | None, sequences: int) -> Tensor:
    """The inputs before each sequence, zeros where there are none, in the inputs' dtype."""
    shape = (sequences, past, inputs.shape[-1])
    if window is None:
        return inputs.new_zeros(shape)
    expect_shape("memory.window", window, "[N, width - 1, channels]", shape)
    return window.to(inputs.dtype)


def _last(window: Tensor, inputs: Tensor) -> Tensor:
    """The window after ``inputs [B, T, C]``: a copy, for a view would keep all of them alive."""
    past, time = window.shape[1], inputs.shape[1]
    return inputs[:, time - past :].clone() if time >= past else torch.cat([window[:, time:], inputs], 1)


def short_convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    window: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    context_group: Any = None,
    context_lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = f(b + Σ_i w_i ⊙ x_{t - W + 1 + i})``, each channel on its own; and the window for the next call.

    Args:
        inputs: ``[B, T, C]``; B is 1 for packed sequences.
        weight: ``[C, 1, W]``, as a depthwise ``Conv1d`` holds it.
        bias: ``[C]`` or None.
        silu: whether f is SiLU; else there is none.
        window: ``[N, W - 1, C]``, the inputs before; None is zeros, the start of a sequence.
        cu_seqlens: ``[N + 1]``, the packed sequences' first tokens, then T; over ranks, of the whole line.
        context_group, context_lengths: the ranks that share the line; see ``parallelflow.integrate``. A window is then
            the first rank's, and packed sequences take none.

    Sums are taken in at least float32; the output has the inputs' dtype. In float32 on a CPU one compiled pass, where
    there is a compiler.
    """
    width = weight.shape[-1]
    if cu_seqlens is None and context_group is None and _compiled(inputs, weight, bias, window):
        from parallelflow.kernels.cpu.convolution import Convolution

        past = _window(inputs, width - 1, window, inputs.shape[0])
        plain = partial(_plain, silu=silu)
        return Convolution.apply(inputs, past, weight[:, 0], bias, silu, plain), _last(past, inputs)
    line = Line.of(inputs, width - 1, window, cu_seqlens, context_group, context_lengths)
    return _convolve(line, weight[:, 0], bias, silu, inputs.dtype), line.window


def _convolve(line: Line, weight: Tensor, bias: Tensor | None, silu: bool, dtype: torch.dtype) -> Tensor:
    """``weight [C, W]``."""
    width = weight.shape[-1]
    taps = weight.to(torch.promote_types(dtype, torch.float32)).unbind(-1)
    total = taps[-1] * line.shifted(0)
    for back in range(1, width):
        total = torch.addcmul(total, taps[-1 - back], line.shifted(back))
    total = line.at_own(total if bias is None else total + bias).to(dtype)
    return F.silu(total) if silu else total


def _plain(inputs: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return _convolve(Line.of(inputs, weight.shape[-1] - 1, window), weight, bias, silu, inputs.dtype)


def _compiled(inputs: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None) -> bool:
    """Whether the compiled kernel takes these."""
    from parallelflow.kernels.cpu import build, convolution

    tensors = [tensor for tensor in (inputs, weight, bias, window) if tensor is not None]
    return (
        may_read(inputs)
        and inputs.numel() > 0
        and inputs.stride(-1) == 1
        and all(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 for x in tensors)
        and (window is None or not window.requires_grad)
        and weight.shape[-1] in convolution.WIDTHS
        and build.COMPILER is not None
        and build.usable()
        and inputs.shape[-1] % convolution.lanes() == 0
    )


def token_shift(
    inputs: Tensor,
    *,
    window: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    context_group: Any = None,
    context_lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """``x_{t-1}`` for every t, ``[B, T, C]``, and the window ``[N, 1, C]`` for the next call."""
    line = Line.of(inputs, 1, window, cu_seqlens, context_group, context_lengths)
    return line.at_own(line.shifted(1)), line.window


def depthwise(channels: int, width: int, bias: bool = False) -> nn.Conv1d:
    """The parameters of a short convolution, as published: ``weight [C, 1, W]`` and ``bias [C]`` of a ``Conv1d``."""
    expect_positive_integer("conv_size", width)
    return nn.Conv1d(channels, channels, width, groups=channels, bias=bias)
