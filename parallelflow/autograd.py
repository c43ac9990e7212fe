"""The engine as one differentiable operation: eager, under ``torch.func``, and under ``torch.compile``.

Eager: an ``autograd.Function`` whose backward is itself one, so that gradients of gradients exist; they are taken by
differentiating the plain forward pass twice. Compiled: a registered operator with a fake implementation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from parallelflow import recurrence, torch_backend
from parallelflow.checks import Memory, fingerprint
from parallelflow.kernels.watch import Applied, Launched, tell
from parallelflow.problem import TIES, Inputs, Traits, sizes_of
from parallelflow.torch_backend import Plan, carry_count

SLOTS = len(Inputs._fields)


class Setting(NamedTuple):
    """All that is not a differentiable tensor; ``backend`` is ``torch``, or a tier of the kernels.

    ``ties`` tells for each slot of the inputs the first slot that holds the same tensor. Only that one is passed
    through autograd, which would otherwise add a tied tensor's gradients itself, zeros included. ``decided`` is where
    kernels keep what follows from the tensors' kind alone; a setting that has it is for tensors of one kind.
    ``passed`` are the slots of the tensors that are passed in eager mode.
    """

    traits: Traits
    plan: Plan
    sequence_starts: list[int] | None
    backend: str
    ties: tuple[int, ...] = tuple(range(SLOTS))
    batch_invariant: bool = True
    final: bool = True
    decided: dict[Any, Any] | None = None
    passed: tuple[int, ...] = ()

    def forward(
        self, untied: Inputs, keep: bool, unrounded: bool = False
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Output, final states (None may stand for them if not ``final``), and what the backward pass starts from.
        Here and in ``backward`` nothing is recorded: who calls has seen to that.

        ``unrounded``: the output as it was summed, where it is rounded last (on a GPU it is rounded all the same).
        """
        again = None if unrounded else self._again(("forward", keep, self.final), untied)
        if again is not None:
            (output, final), saved = again
            if not keep and self.sequence_starts is None:
                tell(lambda: self._launched(untied, output, final))
            return output, final, saved
        inputs = self.tied(untied)
        if self.backend == "torch":
            output, final, carries = self.plain(inputs, unrounded)
            return output, final, carries if keep else []
        from parallelflow.kernels import backend

        return backend.forward(
            inputs, self.traits, self.sequence_starts, self.backend, keep, self.batch_invariant, self.final, unrounded,
            self.decided,
        )  # fmt: skip

    def plain(self, inputs: Inputs, unrounded: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The torch backend's forward pass."""
        return torch_backend.forward(inputs.stacked(), self.traits, self.plan, self.sequence_starts, unrounded)

    def backward(self, untied: Inputs, saved: list[Tensor], d_output: Tensor, d_final: Tensor | None) -> Inputs:
        """Gradients of all that is passed through autograd; ``d_final`` None is zero."""
        again = self._again(("backward", len(saved), d_final is None), untied, *saved, d_output, d_final)
        if again is not None and self.decided is not None:
            return Inputs(*self.decided["to slots"]((*again[0], None)))
        inputs = self.tied(untied)
        if self.backend != "torch":
            from parallelflow.kernels import backend

            gradients = backend.backward(
                inputs, self.traits, self.sequence_starts, self.backend, saved, d_output, d_final, self.batch_invariant,
                self.decided,
            )  # fmt: skip
        else:
            stacked = inputs.stacked()
            if d_final is None:
                d_final = inputs.query.new_zeros(self.states(inputs), dtype=sizes_of(inputs).compute_dtype)
            parts = (saved, d_output, d_final)
            gradients = torch_backend.backward(stacked, self.traits, self.plan, self.sequence_starts, *parts)
            gradients = gradients.unstacked(inputs)
        folded: list[Tensor | None] = [None] * SLOTS
        for gradient, slot in zip(gradients, self.ties, strict=True):
            if gradient is not None:
                before = folded[slot]
                folded[slot] = gradient if before is None else before + gradient
        return Inputs(*folded)  # type: ignore[arg-type]

    def _again(self, name: tuple, untied: Inputs, *more: Tensor | None) -> Any:
        """What a pass of that name makes, where kernels have decided how (``kernels.plan.Pass``) and tensors lie as
        they did; else None. ``slots`` are those of the tensors it is given and of the gradients it makes; of two that
        are tied the one that is not passed through autograd has both."""
        decided = self.decided
        if decided is None or name not in decided or "slots" not in decided:
            return None
        if "of slots" not in decided:
            given, made = decided["slots"]
            decided["of slots"] = itemgetter(*[self.ties[slot] for slot in given])
            order = {slot: place for place, slot in enumerate(made) if self.ties[slot] == slot}
            order |= {self.ties[slot]: place for place, slot in enumerate(made) if self.ties[slot] != slot}
            decided["to slots"] = itemgetter(*[order.get(slot, len(made)) for slot in range(SLOTS)])
        tensors = (*decided["of slots"](untied), *more)
        for tensor in tensors:
            if tensor is not None and not tensor.is_contiguous():
                return None
        return decided[name].again(tensors)

    def _launched(self, untied: Inputs, output: Tensor, final: Tensor | None) -> Launched:
        assert self.decided is not None
        tensors = self.decided["of slots"](untied)
        settle = self.decided["forward", False, self.final].settle
        return Launched((*tensors, output, final), len(tensors), len(tensors) + 1, False, settle)

    def tied(self, untied: Inputs) -> Inputs:
        """The inputs with every slot filled."""
        return Inputs(*[untied[slot] for slot in self.ties])  # type: ignore[arg-type]

    def filled(self, tensors: Sequence[Tensor]) -> Inputs:
        """The inputs with each tensor once, of those that are passed."""
        return Inputs(*_filling(self.passed)((*tensors, None)))

    def untied(self, inputs: Inputs) -> list[Tensor | None]:
        """The inputs with each tensor once."""
        return [tensor if self.ties[slot] == slot else None for slot, tensor in enumerate(inputs)]

    def with_ties(self, inputs: Inputs) -> Setting:
        """The same with the inputs' ties."""
        ties = list(range(SLOTS))
        for slot, other in TIES:
            if inputs[slot] is inputs[other]:
                ties[slot] = other
        return self._replace(ties=tuple(ties))

    def states(self, inputs: Inputs) -> tuple[int, int, int, int]:
        """The shape of the final states, ``[N, HV, K, V]``."""
        _, value_heads, key_dim, value_dim, _ = sizes_of(inputs)
        starts = self.sequence_starts
        return inputs.query.shape[0] if starts is None else len(starts) - 1, value_heads, key_dim, value_dim


@cache
def _filling(passed: tuple[int, ...]) -> Callable[[tuple], tuple]:
    """Of the tensors passed, and None, what stands in each slot."""
    return itemgetter(*[passed.index(slot) if slot in passed else len(passed) for slot in range(SLOTS)])


@cache
def _picking(passed: tuple[int, ...]) -> Callable[[Sequence], tuple]:
    """What stands in the slots passed: always several, a query and a row."""
    return itemgetter(*passed)


def _pulled(
    ctx: Any, saved: Sequence[Tensor], inputs: Inputs, d_output: Tensor | None, d_final: Tensor | None
) -> Sequence[Tensor | None]:
    """Gradients of the inputs, by slots."""
    if d_output is None:  # only the final state was used
        d_output = inputs.query.new_zeros(ctx.output_shape)
    if nothing_to_record([d_output, d_final, *inputs]):
        return ctx.setting.backward(inputs, list(saved), d_output, d_final)
    gradients = iter(_FlowBackward.apply(ctx.setting, len(saved), *saved, d_output, d_final, *inputs))
    return [None if tensor is None else next(gradients) for tensor in inputs]


class _Flow(torch.autograd.Function):
    """``(setting, *inputs) -> (output, final_state, *saved)``."""

    @staticmethod
    def forward(setting: Setting, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        output, final, saved = setting.forward(Inputs(*inputs), keep=True)  # type: ignore[arg-type]
        assert final is not None
        return output, final, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.setting, ctx.saved_count = inputs[0], len(output) - 2
        ctx.save_for_backward(*output[2:], *inputs[1:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.output_shape = output[0].shape

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *_: Tensor) -> tuple:
        count, kept = ctx.saved_count, ctx.saved_tensors  # unpacked once: checkpointing allows no second time
        return None, *_pulled(ctx, kept[:count], Inputs(*kept[count:]), d_output, d_final)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "parallelflow: forward-mode differentiation (jvp) is not implemented; use reverse mode (grad, vjp)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, setting: Setting, *inputs: Tensor | None) -> tuple[tuple, tuple]:
        setting = setting._replace(decided=None)  # tensors of a larger batch are of another kind
        if setting.sequence_starts is not None:
            results = [_Flow.apply(setting, *_pick(inputs, in_dims[1:], n)) for n in range(info.batch_size)]
            stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
            return stacked, (0,) * len(stacked)
        # What is saved belongs to the merged batch, and goes back to it as it is.
        output, final, *saved = _Flow.apply(setting, *_merge(inputs, in_dims[1:], info.batch_size))
        return (*_unmerge((output, final), info.batch_size), *saved), (0, 0, *(None for _ in saved))


class _EagerFlow(torch.autograd.Function):
    """``(setting, *tensors) -> (output, final_state)``: the same where no function transform watches, and of the
    inputs' slots only those that are passed (``Setting.passed``). That spares autograd a third of its time on the host
    (signatures bound, what is saved wrapped as outputs, and what it does for every argument)."""

    @staticmethod
    def forward(ctx: Any, setting: Setting, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        output, final, saved = setting.forward(setting.filled(tensors), keep=True)
        ctx.setting, ctx.saved_count, ctx.output_shape = setting, len(saved), output.shape
        ctx.save_for_backward(*saved, *tensors)
        ctx.set_materialize_grads(False)
        return output, final

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_final: Tensor | None) -> tuple:
        count, kept = ctx.saved_count, ctx.saved_tensors
        found = _pulled(ctx, kept[:count], ctx.setting.filled(kept[count:]), d_output, d_final)
        return None, *_picking(ctx.setting.passed)(found)


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

        unused = d_final is None
        if unused:
            states = setting.states(setting.tied(Inputs(*inputs)))
            d_final = torch.zeros(states, dtype=torch.float32, device=d_output.device)

        def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            """The plain forward pass, which autograd differentiates."""
            filled: list[Tensor | None] = [None] * len(inputs)
            for slot, tensor in zip(present, tensors, strict=True):
                filled[slot] = tensor
            followed = setting._replace(plan=setting.plan.interpreted())
            return followed.plain(setting.tied(Inputs(*filled)))[:2]  # type: ignore[arg-type]

        def pull(d_output: Tensor, d_final: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            (_, final), back = torch.func.vjp(run, *tensors)  # type: ignore[misc]
            return back((d_output, d_final.to(final.dtype)))

        twice: Any = torch.func.vjp(pull, d_output, d_final, *(inputs[slot] for slot in present))
        dd_output, dd_final, *gradients = twice[1](cotangents)
        filled = [None] * len(inputs)
        for slot, gradient in zip(present, gradients, strict=True):
            filled[slot] = gradient
        return None, None, *(None for _ in range(ctx.count)), dd_output, None if unused else dd_final, *filled

    @staticmethod
    def vmap(info: Any, in_dims: tuple, setting: Setting, count: int, *tensors: Tensor | None) -> tuple[tuple, tuple]:
        dims = in_dims[2:]
        setting = setting._replace(decided=None)
        if setting.sequence_starts is not None:
            every = [_FlowBackward.apply(setting, count, *_pick(tensors, dims, n)) for n in range(info.batch_size)]
            stacked = tuple(torch.stack(parts) for parts in zip(*every, strict=True))
            return stacked, (0,) * len(stacked)
        merged = _merge(tensors[count:], dims[count:], info.batch_size)
        gradients = _FlowBackward.apply(setting, count, *tensors[:count], *merged)
        return _unmerge(gradients, info.batch_size), (0,) * len(gradients)


for _function in (_Flow.forward, _FlowBackward.forward):  # asked for in every call, and inspect would make it anew
    setattr(_function, "__signature__", inspect.signature(_function))  # noqa: B010


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


class Code(NamedTuple):
    """A setting in the types that an operator takes."""

    flags: list[int]
    positions: list[int]
    lone_positions: list[int]
    ties: list[int]
    scale: float | None
    names: str

    @staticmethod
    def of(setting: Setting) -> Code:
        traits, plan = setting.traits, setting.plan
        signs = [traits.read_sign, traits.value_sign, traits.lone_sign]
        flags = [int(traits.sequential), int(traits.raw), int(traits.tied), *signs, plan.chunk_size]
        flags += [int(setting.batch_invariant), int(plan.compiled)]
        names = f"{plan.solver} {plan.aggregate} {setting.backend}"
        lists = (list(traits.positions), list(traits.lone_positions), list(setting.ties))
        return Code(flags, *lists, traits.scale, names)

    def setting(self, cu_seqlens: Tensor | None) -> Setting:
        sequential, raw, tied, read_sign, value_sign, lone_sign, chunk_size, batch_invariant, compiled = self.flags
        traits = Traits(
            bool(sequential), bool(raw), tuple(self.positions), tuple(self.lone_positions),
            read_sign, value_sign, lone_sign, bool(tied), self.scale,
        )  # fmt: skip
        solver, aggregate, backend = self.names.split()
        starts = None if cu_seqlens is None else cu_seqlens.tolist()
        plan = Plan(chunk_size, solver, aggregate, bool(compiled))
        return Setting(traits, plan, starts, backend, tuple(self.ties), bool(batch_invariant))


_DECIDED: Memory[dict[Any, Any]] = Memory()


def _of_one_kind(setting: Setting, inputs: Inputs) -> Setting:
    """The setting, with what is known of such tensors."""
    starts = setting.sequence_starts
    known = setting._replace(sequence_starts=None if starts is None else tuple(starts))  # type: ignore[arg-type]
    key = (known, *fingerprint(*inputs))
    decided = _DECIDED.recall(key)
    if decided is None:
        decided = {}
        _DECIDED.keep(key, decided)
    return setting._replace(decided=decided)


TENSORS = ", ".join(("Tensor query", *(f"Tensor? {name}" for name in Inputs._fields[1:])))
CODE = "SymInt[] flags, SymInt[] positions, SymInt[] lone_positions, SymInt[] ties, float? scale, str names"
"""``Inputs`` and ``Code`` in the language of operators' schemas."""


@torch.library.custom_op(
    "parallelflow::integrate",
    mutates_args=(),
    schema=f"({TENSORS}, Tensor? cu_seqlens, {CODE}) -> (Tensor, Tensor, Tensor)",
)
def _integrate(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, cu_seqlens = Inputs(*arguments[:SLOTS]), arguments[SLOTS]
    setting = _of_one_kind(Code(*arguments[SLOTS + 1 :]).setting(cu_seqlens), inputs)
    output, final, carries = setting.forward(inputs, keep=setting.backend == "torch")
    assert final is not None
    if setting.backend != "torch":  # the kernels make theirs again
        return output, final, inputs.query.new_empty(0)
    batch, time = inputs.query.shape[:2]
    saved = final.new_zeros(carry_count(setting.plan, final.shape[1], time), batch, *final.shape[1:])
    for number, carry in enumerate(carries):
        saved[number] = carry
    return output, final, saved


@_integrate.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    untied, cu_seqlens = Inputs(*arguments[:SLOTS]), arguments[SLOTS]
    setting = Code(*arguments[SLOTS + 1 :]).setting(None)
    query, plan, backend = untied.query, setting.plan, setting.backend
    _, value_heads, key_dim, value_dim, dtype = sizes_of(setting.tied(untied))
    batch, time = query.shape[:2]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (value_heads, key_dim, value_dim)
    saved = query.new_empty(0)  # kernels make theirs again
    if backend == "torch":
        saved = query.new_empty(carry_count(plan, value_heads, time), batch, *state, dtype=dtype)
    output = query.new_empty(batch, time, value_heads, value_dim)
    return output, query.new_empty(sequences, *state, dtype=dtype), saved


@torch.library.custom_op(
    "parallelflow::integrate_backward",
    mutates_args=(),
    schema="(Tensor[] inputs, SymInt[] present, Tensor? cu_seqlens, Tensor saved, Tensor d_output, Tensor d_final, "
    f"{CODE}) -> Tensor[]",
)
def _integrate_backward(
    inputs: list[Tensor],
    present: list[int],
    cu_seqlens: Tensor | None,
    saved: Tensor,
    d_output: Tensor,
    d_final: Tensor,
    *code: Any,
) -> list[Tensor]:
    filled: list[Tensor | None] = [None] * SLOTS
    for slot, tensor in zip(present, inputs, strict=True):
        filled[slot] = tensor
    full = Inputs(*filled)  # type: ignore[arg-type]
    kept = list(saved.unbind(0)) if saved.numel() else []
    setting = _of_one_kind(Code(*code).setting(cu_seqlens), full)
    gradients = setting.backward(full, kept, d_output, d_final)
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
    inputs: Inputs,
    traits: Traits,
    plan: Plan,
    sequence_starts: list[int] | None,
    cu_seqlens: Tensor | None,
    backend: str,
    batch_invariant: bool = True,
    final_state: bool = True,
    decided: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output and final states, differentiable; None may stand for states that are not asked for. ``decided``, of
    tensors of one kind: see ``Setting``."""
    unlike = torch.compiler.is_compiling() or transformed()
    setting = Setting(traits, plan, sequence_starts, backend, batch_invariant=batch_invariant,
                      final=final_state or unlike, decided=None if unlike else decided)  # fmt: skip
    setting = setting.with_ties(inputs)
    untied = setting.untied(inputs)
    if torch.compiler.is_compiling():
        output, final, _ = _integrate(*untied, cu_seqlens, *Code.of(setting))
    elif nothing_to_record(untied):
        output, final, _ = setting.forward(Inputs(*untied), keep=False)  # type: ignore[arg-type]
    elif transformed():
        output, final, *_ = _Flow.apply(setting, *untied)
    else:
        setting = setting._replace(passed=tuple([slot for slot in range(SLOTS) if untied[slot] is not None]))
        tensors = [untied[slot] for slot in setting.passed]
        output, final = _EagerFlow.apply(setting, *tensors)
        tell(lambda: Applied(_EagerFlow, setting, tensors, output, final))
    return output, final


def advance(inputs: Inputs, traits: Traits, backend: str) -> tuple[Tensor, Tensor]:
    """Output and state after one token (T = 1): plain operations, or the CPU's kernel where nobody records them."""
    if backend != "cpu" or torch.compiler.is_compiling() or not nothing_to_record(inputs):
        return recurrence.advance(inputs.stacked(), traits)
    from parallelflow.kernels.backend import step

    return step(inputs, traits)


def transformed() -> bool:
    """Whether a function transform or forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def nothing_to_record(tensors: Sequence[Tensor | None]) -> bool:
    """Whether neither autograd nor a function transform watches these tensors."""
    if transformed():
        return False
    return not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))
