"""The engine as one differentiable operation: eager, under ``torch.func``, and under ``torch.compile``.

Eager: an ``autograd.Function`` whose backward is itself one, so that gradients of gradients exist; they are taken by
differentiating the plain forward pass twice. Compiled: a registered operator with a fake implementation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallelflow.problem import Inputs, Traits, sizes_of
from parallelflow.torch_backend import Plan, backward, carry_count, forward

SLOTS = len(Inputs._fields)


class Setting(NamedTuple):
    """All that is not a differentiable tensor."""

    traits: Traits
    plan: Plan
    sequence_starts: list[int] | None


class _Flow(torch.autograd.Function):
    """``(setting, *inputs) -> (output, final_state, saved)``."""

    @staticmethod
    def forward(setting: Setting, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return forward(Inputs(*inputs), *setting)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.setting, tensors = inputs[0], inputs[1:]
        ctx.save_for_backward(output[2], *tensors)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor, _: Tensor) -> tuple:
        saved, *inputs = ctx.saved_tensors
        gradients = iter(_FlowBackward.apply(ctx.setting, saved, d_output, d_final, *inputs))
        return None, *(None if tensor is None else next(gradients) for tensor in inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "parallelflow: forward-mode differentiation (jvp) is not implemented; use reverse mode (grad, vjp)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, setting: Setting, *inputs: Tensor | None) -> tuple[tuple, tuple]:
        if setting.sequence_starts is not None:
            results = [_Flow.apply(setting, *_pick(inputs, in_dims[1:], n)) for n in range(info.batch_size)]
            return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0, 0)
        # What is saved belongs to the merged batch, and goes back to it as it is.
        output, final, saved = _Flow.apply(setting, *_merge(inputs, in_dims[1:], info.batch_size))
        return (*_unmerge((output, final), info.batch_size), saved), (0, 0, None)


class _FlowBackward(torch.autograd.Function):
    """``(setting, saved, d_output, d_final, *inputs) ->`` the gradients of the inputs that are not None."""

    @staticmethod
    def forward(
        setting: Setting, saved: Tensor, d_output: Tensor, d_final: Tensor, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        gradients = backward(Inputs(*inputs), *setting, saved, d_output, d_final)  # type: ignore[arg-type]
        return tuple(gradient for gradient in gradients if gradient is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.setting = inputs[0]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        d_output, d_final, *inputs = ctx.saved_tensors
        present = [slot for slot, tensor in enumerate(inputs) if tensor is not None]

        def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            filled: list[Tensor | None] = [None] * len(inputs)
            for slot, tensor in zip(present, tensors, strict=True):
                filled[slot] = tensor
            return forward(Inputs(*filled), *ctx.setting)[:2]  # type: ignore[arg-type]

        def pull(d_output: Tensor, d_final: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(run, *tensors)[1]((d_output, d_final))

        _, pull_twice = torch.func.vjp(pull, d_output, d_final, *(inputs[slot] for slot in present))
        dd_output, dd_final, *gradients = pull_twice(cotangents)
        filled = [None] * len(inputs)
        for slot, gradient in zip(present, gradients, strict=True):
            filled[slot] = gradient
        return None, None, dd_output, dd_final, *filled

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple,
        setting: Setting,
        saved: Tensor,
        d_output: Tensor,
        d_final: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[tuple, tuple]:
        size = info.batch_size
        tensors = (d_output, d_final, *inputs)
        if setting.sequence_starts is not None:
            results = [
                _FlowBackward.apply(
                    setting, *_pick((saved,), in_dims[1:2], n), *_pick(tensors, in_dims[2:], n)
                )
                for n in range(size)
            ]  # fmt: skip
            stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
            return stacked, (0,) * len(stacked)
        gradients = _FlowBackward.apply(setting, saved, *_merge(tensors, in_dims[2:], size))
        return _unmerge(gradients, size), (0,) * len(gradients)


def _pick(tensors: tuple, dims: tuple, number: int) -> list[Tensor | None]:
    return [
        tensor if tensor is None or dim is None else tensor.select(dim, number)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]


def _merge(tensors: tuple, dims: tuple, size: int) -> list[Tensor | None]:
    """A mapped axis becomes part of the batch: every tensor has the batch (or the sequences) first."""
    merged: list[Tensor | None] = []
    for tensor, dim in zip(tensors, dims, strict=True):
        if tensor is None:
            merged.append(None)
        else:
            tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            merged.append(tensor.flatten(0, 1))
    return merged


def _unmerge(tensors: tuple, size: int) -> tuple[Tensor, ...]:
    return tuple(tensor.unflatten(0, (size, -1)) for tensor in tensors)


# torch.compile: the same two functions as registered operators.


class _Code(NamedTuple):
    """A setting in the types that an operator takes."""

    flags: list[int]
    positions: list[int]
    lone_positions: list[int]
    scale: float | None
    solver: str
    aggregate: str

    @staticmethod
    def of(traits: Traits, plan: Plan) -> _Code:
        flags = [traits.sequential, traits.raw, traits.read_sign, traits.value_sign, traits.lone_sign, plan.chunk_size]
        flags = [int(flag) for flag in flags]
        positions = list(traits.positions), list(traits.lone_positions)
        return _Code(flags, *positions, traits.scale, plan.solver, plan.aggregate)

    def setting(self, cu_seqlens: Tensor | None) -> Setting:
        sequential, raw, *signs, chunk_size = self.flags
        positions = tuple(self.positions), tuple(self.lone_positions)
        traits = Traits(bool(sequential), bool(raw), *positions, *signs, self.scale)
        starts = None if cu_seqlens is None else cu_seqlens.tolist()
        return Setting(traits, Plan(chunk_size, self.solver, self.aggregate), starts)


@torch.library.custom_op("parallelflow::integrate", mutates_args=())
def _integrate(
    query: Tensor,
    read: Tensor | None,
    read_coefficient: Tensor | None,
    write: Tensor | None,
    value: Tensor | None,
    value_coefficient: Tensor | None,
    lone_write: Tensor | None,
    lone_value: Tensor | None,
    lone_coefficient: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    flags: list[int],
    positions: list[int],
    lone_positions: list[int],
    scale: float | None,
    solver: str,
    aggregate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(
        query, read, read_coefficient, write, value, value_coefficient, lone_write, lone_value, lone_coefficient,
        log_decay, initial_state,
    )  # fmt: skip
    code = _Code(flags, positions, lone_positions, scale, solver, aggregate)
    output, final, saved = forward(inputs, *code.setting(cu_seqlens))
    if initial_state is not None and final.untyped_storage().data_ptr() == initial_state.untyped_storage().data_ptr():
        final = final.clone()  # an operator's results must not be its inputs
    return output, final, saved


@_integrate.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    inputs, cu_seqlens = Inputs(*arguments[:SLOTS]), arguments[SLOTS]
    query, plan = inputs.query, _Code(*arguments[SLOTS + 1 :]).setting(None).plan
    heads, value_heads, key_dim, value_dim, dtype = sizes_of(inputs)
    batch, time = query.shape[:2]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        query.new_empty(batch, time, value_heads, value_dim),
        query.new_empty(sequences, value_heads, key_dim, value_dim, dtype=dtype),
        query.new_empty(carry_count(plan, value_heads, time), batch, value_heads, key_dim, value_dim, dtype=dtype),
    )


@torch.library.custom_op("parallelflow::integrate_backward", mutates_args=())
def _integrate_backward(
    inputs: list[Tensor],
    present: list[int],
    cu_seqlens: Tensor | None,
    saved: Tensor,
    d_output: Tensor,
    d_final: Tensor,
    flags: list[int],
    positions: list[int],
    lone_positions: list[int],
    scale: float | None,
    solver: str,
    aggregate: str,
) -> list[Tensor]:
    code = _Code(flags, positions, lone_positions, scale, solver, aggregate)
    filled: list[Tensor | None] = [None] * SLOTS
    for slot, tensor in zip(present, inputs, strict=True):
        filled[slot] = tensor
    full = Inputs(*filled)  # type: ignore[arg-type]
    gradients = backward(full, *code.setting(cu_seqlens), saved, d_output, d_final)
    return [gradient.contiguous() for gradient in gradients if gradient is not None]


@_integrate_backward.register_fake
def _(inputs, *arguments):  # type: ignore[no-untyped-def]
    return [tensor.new_empty(tensor.shape) for tensor in inputs]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, cu_seqlens, ctx.code = inputs[:SLOTS], inputs[SLOTS], inputs[SLOTS + 1 :]
    ctx.present = [slot for slot, tensor in enumerate(tensors) if tensor is not None]
    ctx.save_for_backward(cu_seqlens, output[2], *(tensor for tensor in tensors if tensor is not None))
    ctx.mark_non_differentiable(output[2])


def _pull(ctx: Any, d_output: Tensor, d_final: Tensor, _: Tensor) -> tuple:
    cu_seqlens, saved, *inputs = ctx.saved_tensors
    found = _integrate_backward(inputs, ctx.present, cu_seqlens, saved, d_output, d_final, *ctx.code)
    gradients: list[Tensor | None] = [None] * SLOTS
    for slot, gradient in zip(ctx.present, found, strict=True):
        gradients[slot] = gradient
    return *gradients, *(None,) * (1 + len(ctx.code))


torch.library.register_autograd("parallelflow::integrate", _pull, setup_context=_setup)


def run(
    inputs: Inputs, traits: Traits, plan: Plan, sequence_starts: list[int] | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and final states, differentiable."""
    if torch.compiler.is_compiling():
        output, final, _ = _integrate(*inputs, cu_seqlens, *_Code.of(traits, plan))
    else:
        output, final, _ = _Flow.apply(Setting(traits, plan, sequence_starts), *inputs)
    return output, final
