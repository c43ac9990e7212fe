"""The engine as one differentiable operation: eager, under ``torch.func``, and under ``torch.compile``.

Eager: an ``autograd.Function`` whose backward is itself one, so that gradients of gradients exist; they are taken by
differentiating the plain forward pass twice. Compiled: a registered operator with a fake implementation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallelflow import torch_backend
from parallelflow.problem import Inputs, Traits, sizes_of
from parallelflow.torch_backend import Plan, carry_count

SLOTS = len(Inputs._fields)


class Setting(NamedTuple):
    """All that is not a differentiable tensor; ``backend`` is ``torch``, or a tier of the kernels."""

    traits: Traits
    plan: Plan
    sequence_starts: list[int] | None
    backend: str

    def forward(self, inputs: Inputs, keep: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Output, final states, and what the backward pass starts from."""
        if self.backend == "torch":
            output, final, carries = torch_backend.forward(inputs, self.traits, self.plan, self.sequence_starts)
            return output, final, [carries]
        from parallelflow.kernels import backend

        return backend.forward(inputs, self.traits, self.sequence_starts, self.backend, keep)

    def backward(self, inputs: Inputs, saved: list[Tensor], d_output: Tensor, d_final: Tensor) -> Inputs:
        """Gradients of all inputs."""
        if self.backend == "torch":
            parts = (saved[0], d_output, d_final)
            return torch_backend.backward(inputs, self.traits, self.plan, self.sequence_starts, *parts)
        from parallelflow.kernels import backend

        return backend.backward(
            inputs, self.traits, self.sequence_starts, self.backend, saved, d_output, d_final
        )  # fmt: skip


class _Flow(torch.autograd.Function):
    """``(setting, *inputs) -> (output, final_state, *saved)``."""

    @staticmethod
    def forward(setting: Setting, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        output, final, saved = setting.forward(Inputs(*inputs), keep=True)  # type: ignore[arg-type]
        return output, final, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.setting, ctx.saved_count = inputs[0], len(output) - 2
        ctx.save_for_backward(*output[2:], *inputs[1:])
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor, *_: Tensor) -> tuple:
        count, kept = ctx.saved_count, ctx.saved_tensors  # unpacked once: checkpointing allows no second time
        saved, inputs = kept[:count], kept[count:]
        found = _FlowBackward.apply(ctx.setting, count, *saved, d_output, d_final, *inputs)
        gradients = iter(found)
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
            stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
            return stacked, (0,) * len(stacked)
        # What is saved belongs to the merged batch, and goes back to it as it is.
        output, final, *saved = _Flow.apply(setting, *_merge(inputs, in_dims[1:], info.batch_size))
        return (*_unmerge((output, final), info.batch_size), *saved), (0, 0, *(None for _ in saved))


class _FlowBackward(torch.autograd.Function):
    """``(setting, count, *saved, d_output, d_final, *inputs) ->`` the gradients of the inputs that are not None."""

    @staticmethod
    def forward(setting: Setting, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        saved, (d_output, d_final, *inputs) = list(tensors[:count]), tensors[count:]
        gradients = setting.backward(Inputs(*inputs), saved, d_output, d_final)  # type: ignore[arg-type]
        return tuple(gradient for gradient in gradients if gradient is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.setting, ctx.count = inputs[:2]
        ctx.save_for_backward(*inputs[2 + ctx.count :])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        d_output, d_final, *inputs = ctx.saved_tensors
        setting = ctx.setting
        present = [slot for slot, tensor in enumerate(inputs) if tensor is not None]

        def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            """The plain forward pass, which autograd differentiates."""
            filled: list[Tensor | None] = [None] * len(inputs)
            for slot, tensor in zip(present, tensors, strict=True):
                filled[slot] = tensor
            plain = (setting.traits, setting.plan, setting.sequence_starts)
            return torch_backend.forward(Inputs(*filled), *plain)[:2]  # type: ignore[arg-type]

        def pull(d_output: Tensor, d_final: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            found: Any = torch.func.vjp(run, *tensors)
            return found[1]((d_output, d_final))

        twice: Any = torch.func.vjp(pull, d_output, d_final, *(inputs[slot] for slot in present))
        dd_output, dd_final, *gradients = twice[1](cotangents)
        filled = [None] * len(inputs)
        for slot, gradient in zip(present, gradients, strict=True):
            filled[slot] = gradient
        return None, None, *(None for _ in range(ctx.count)), dd_output, dd_final, *filled

    @staticmethod
    def vmap(info: Any, in_dims: tuple, setting: Setting, count: int, *tensors: Tensor | None) -> tuple[tuple, tuple]:
        dims = in_dims[2:]
        if setting.sequence_starts is not None:
            every = [_FlowBackward.apply(setting, count, *_pick(tensors, dims, n)) for n in range(info.batch_size)]
            stacked = tuple(torch.stack(parts) for parts in zip(*every, strict=True))
            return stacked, (0,) * len(stacked)
        merged = _merge(tensors[count:], dims[count:], info.batch_size)
        gradients = _FlowBackward.apply(setting, count, *tensors[:count], *merged)
        return _unmerge(gradients, info.batch_size), (0,) * len(gradients)


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
    names: str

    @staticmethod
    def of(setting: Setting) -> _Code:
        traits, plan = setting.traits, setting.plan
        signs = [traits.read_sign, traits.value_sign, traits.lone_sign]
        flags = [int(traits.sequential), int(traits.raw), int(traits.tied), *signs, plan.chunk_size]
        names = f"{plan.solver} {plan.aggregate} {setting.backend}"
        return _Code(flags, list(traits.positions), list(traits.lone_positions), traits.scale, names)

    def setting(self, cu_seqlens: Tensor | None) -> Setting:
        sequential, raw, tied, read_sign, value_sign, lone_sign, chunk_size = self.flags
        traits = Traits(
            bool(sequential), bool(raw), tuple(self.positions), tuple(self.lone_positions),
            read_sign, value_sign, lone_sign, bool(tied), self.scale,
        )  # fmt: skip
        solver, aggregate, backend = self.names.split()
        starts = None if cu_seqlens is None else cu_seqlens.tolist()
        return Setting(traits, Plan(chunk_size, solver, aggregate), starts, backend)


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
    names: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(
        query, read, read_coefficient, write, value, value_coefficient, lone_write, lone_value, lone_coefficient,
        log_decay, initial_state,
    )  # fmt: skip
    code = _Code(flags, positions, lone_positions, scale, names)
    output, final, saved = code.setting(cu_seqlens).forward(inputs, keep=False)
    return output, final, saved[0] if saved else query.new_empty(0)


@_integrate.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    inputs, cu_seqlens = Inputs(*arguments[:SLOTS]), arguments[SLOTS]
    query, (_, plan, _, backend) = inputs.query, _Code(*arguments[SLOTS + 1 :]).setting(None)
    _, value_heads, key_dim, value_dim, dtype = sizes_of(inputs)
    batch, time = query.shape[:2]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (value_heads, key_dim, value_dim)
    saved = query.new_empty(0)  # kernels make theirs again
    if backend == "torch":
        saved = query.new_empty(carry_count(plan, value_heads, time), batch, *state, dtype=dtype)
    output = query.new_empty(batch, time, value_heads, value_dim)
    return output, query.new_empty(sequences, *state, dtype=dtype), saved


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
    names: str,
) -> list[Tensor]:
    code = _Code(flags, positions, lone_positions, scale, names)
    filled: list[Tensor | None] = [None] * SLOTS
    for slot, tensor in zip(present, inputs, strict=True):
        filled[slot] = tensor
    full = Inputs(*filled)  # type: ignore[arg-type]
    kept = [saved] if saved.numel() else []
    gradients = code.setting(cu_seqlens).backward(full, kept, d_output, d_final)
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


def run(inputs: Inputs, setting: Setting, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and final states, differentiable."""
    if torch.compiler.is_compiling():
        output, final, _ = _integrate(*inputs, cu_seqlens, *_Code.of(setting))
    else:
        output, final, *_ = _Flow.apply(setting, *inputs)
    return output, final
