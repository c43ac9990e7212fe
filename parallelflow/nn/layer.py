"""What every layer is: hidden states in, hidden states out, and a memory of constant size between calls."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallelflow.checks import (
    expect_floating,
    expect_kind,
    expect_offsets,
    expect_positive_integer,
    expect_starts,
    expect_tensor,
    nearest,
    show,
)
from parallelflow.integrate import Options, Result, ResultWithStates
from parallelflow.nn.engine import check_engine
from parallelflow.nn.packing import Packing
from parallelflow.problem import may_read

AnyResult = Result | ResultWithStates


class Memory(NamedTuple):
    """What a layer carries from call to call.

    ``window [N, W - 1, C]`` are the last inputs of its short convolution (None without one), ``state [N, HV, K, V]``
    the flow's state, at least float32. N is the number of sequences: the batch, or those packed on a line.
    """

    window: Tensor | None
    state: Tensor


class Mixed(NamedTuple):
    """``output [B, T, D]``, and the memory for the next call."""

    output: Tensor
    memory: Any

    def per_token(self, change: Callable[[Tensor], Tensor]) -> Mixed:
        """With every tensor that has a row a token changed."""
        return self._replace(output=change(self.output))


class Sequences(NamedTuple):
    """Where sequences begin on a packed line, and the same on the host (None: side by side); where the line is cut over
    ranks, their group, and each one's tokens."""

    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    context_group: Any = None
    context_lengths: Sequence[int] | None = None

    @property
    def remembered(self) -> bool:
        """Whether a memory comes out: over ranks only of sequences side by side, which all end on the last rank."""
        return self.context_group is None or self.cu_seqlens is None

    def line(self) -> dict[str, Any]:
        """For what looks back a few tokens; over ranks it reads the boundaries on the host."""
        over_ranks = self.context_group is not None and self.cu_seqlens_cpu is not None
        return {
            "cu_seqlens": self.cu_seqlens_cpu if over_ranks else self.cu_seqlens,
            "context_group": self.context_group,
            "context_lengths": self.context_lengths,
        }

    def memory(self, window: Tensor | None, state: Tensor | None) -> Memory | None:
        """None on the ranks where the sequences do not end."""
        return None if state is None else Memory(window, state)


class Layer(nn.Module):
    """Mixes tokens over time.

    Args:
        hidden_size: D, the channels of the hidden states.
        engine: options of ``parallelflow.integrate`` for every call: ``discretization``, ``scale``, ``chunk_size``,
            ``solver``, ``aggregate``, ``backend``, ``batch_invariant``, ``validate``.

    Called with

    - ``hidden_states [B, T, D]``,
    - ``attention_mask``, None or ``[B, T]``: 1 for a token, 0 for padding, on either side or between; outputs are zero
      at padding, and those of the sequence alone elsewhere; a longer mask's last T columns count,
    - ``cu_seqlens [N + 1]`` (and ``cu_seqlens_cpu``, the same on the host), for sequences packed on a line of B = 1,
    - ``memory`` of an earlier call, None at the start of the sequences,
    - ``first_value``, which RWKV-7 alone takes,
    - ``context_lengths``, the tokens of each rank of ``set_context_group``; None: they are asked for,

    a layer returns ``Mixed(output [B, T, D], memory)``. Cutting a sequence into calls, one token or many, changes
    nothing but rounding; nor does cutting it over ranks (``set_context_group``), of which the first takes the memory
    and the last returns it.

    Raises:
        TypeError, ValueError: for shapes that do not fit, and for a mask together with ``cu_seqlens`` or ranks.
    """

    context_group: Any = None
    remembers: type = Memory
    takes_first_value = False

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        known = options_of(cls)
        for option in options:
            if option not in known:
                raise TypeError(
                    f"{option}: {cls.__name__} has no such option{nearest(option, known)}; it has {', '.join(known)}"
                )
        return super().__new__(cls)

    def __init__(self, hidden_size: int, engine: Options | None = None) -> None:
        super().__init__()
        expect_positive_integer("hidden_size", hidden_size)
        self.hidden_size = hidden_size
        self.engine: Any = check_engine(engine)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        memory: Any = None,
        first_value: Tensor | None = None,
        context_lengths: Sequence[int] | None = None,
    ) -> Mixed:
        expect_floating("hidden_states", hidden_states)
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states: got shape {show(hidden_states)}, expected [B, T, D] with D = {self.hidden_size}"
            )
        if not torch.compiler.is_compiling():
            self._check(hidden_states, memory)
        if first_value is not None and not self.takes_first_value:
            raise TypeError(f"first_value: got one, expected none: a {type(self).__name__} does not take it")
        group = self.context_group
        if cu_seqlens is not None or cu_seqlens_cpu is not None:
            expect_offsets(cu_seqlens, cu_seqlens_cpu, hidden_states)
            assert cu_seqlens is not None
            if cu_seqlens.device != hidden_states.device:
                cu_seqlens, cu_seqlens_cpu = cu_seqlens.to(hidden_states.device), cu_seqlens
            if group is None and may_read(hidden_states):
                expect_starts(cu_seqlens.tolist(), hidden_states.shape[1])
        if group is not None and attention_mask is not None:
            raise ValueError("attention_mask: got one with a context group, expected packed sequences or none")
        if group is not None and context_lengths is None:
            context_lengths = tokens_of_ranks(group, hidden_states)
        if cu_seqlens is None:
            packing = Packing.of(attention_mask, hidden_states)
        elif attention_mask is None:
            packing = None
        else:
            raise ValueError("attention_mask: got one together with cu_seqlens, expected one or the other")
        shared = {} if first_value is None else {"first_value": first_value}
        if packing is None:
            sequences = Sequences(cu_seqlens, cu_seqlens_cpu, group, context_lengths)
            return self.mix(hidden_states, memory, sequences, **shared)
        sequences = Sequences(packing.cu_seqlens, packing.cu_seqlens_cpu)
        shared = {name: packing.pack(tensor) for name, tensor in shared.items()}
        return self.mix(packing.pack(hidden_states), memory, sequences, **shared).per_token(packing.unpack)

    def _check(self, hidden_states: Tensor, memory: Any) -> None:
        """TypeError for hidden states that the projections do not take, and for what is no memory of such a layer."""
        if memory is not None:
            expect_kind("memory", memory, self.remembers, f"a {self.remembers.__name__} of an earlier call, or None")
            if isinstance(memory, Memory):
                expect_tensor("memory.state", memory.state)
        weights = (part.weight for part in self.modules() if isinstance(part, nn.Linear))
        dtype = next((weight.dtype for weight in weights), hidden_states.dtype)
        same = dtype == hidden_states.dtype or torch.is_autocast_enabled(hidden_states.device.type)
        if not same and dtype.is_floating_point and dtype.itemsize > 1:  # else the projections are not PyTorch's own
            raise TypeError(f"hidden_states: got dtype {hidden_states.dtype}, expected the parameters', {dtype}")

    @abstractmethod
    def mix(self, hidden_states: Tensor, memory: Any, sequences: Sequences) -> Mixed:
        """The layer itself, on sequences without padding."""

    def options(self, state: Tensor | None, sequences: Sequences) -> dict[str, Any]:
        """For the model's function: where to go on from, and the engine's."""
        options = {"initial_state": state, "return_final_state": sequences.remembered, **sequences._asdict()}
        if sequences.context_group is not None:
            options["aggregate"] = "distributed"
        return {**options, **self.engine}

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values of the layer's own parameters, and of those of its parts (by dotted names) that start otherwise
        than the parts themselves do."""
        return {}

    @torch.no_grad()
    def register_initial_values(self) -> None:
        """Makes parameters of ``initial_values``; those of parts that are there take the values."""
        for name, value in self.initial_values().items():
            if "." in name:
                self.get_parameter(name).copy_(value)
            else:
                self.register_parameter(name, nn.Parameter(value))


def tokens_of_ranks(context_group: Any, hidden_states: Tensor) -> list[int]:
    """How many tokens each rank of a group has, of which this one has ``hidden_states [B, T, D]``."""
    from parallelflow.distributed import Context, lengths_of

    return lengths_of(Context.of(context_group), hidden_states.shape[1], hidden_states.device)


def set_context_group(module: nn.Module, context_group: Any) -> None:
    """From now on all layers in ``module`` (and a model's loss) take their tokens for a rank's share of longer lines.

    Args:
        module: a layer, a language model of ``parallelflow.models``, or anything that has such parts.
        context_group: a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension, whose ranks hold the line in order, as
            ``integrate`` takes it; None: each line is whole again.

    Every rank then makes the same calls, forward and backward. Parameters are each rank's own: the sum of their
    gradients over the ranks is the gradient of the sum of the ranks' losses.

    Raises:
        TypeError, ValueError: for what is no group, and where nothing in ``module`` can be told.
    """
    if context_group is not None:
        from parallelflow.distributed import Context

        Context.of(context_group)
    parts = [part for part in module.modules() if hasattr(type(part), "context_group")]
    if not parts:
        raise ValueError(f"module: got a {type(module).__name__} without layers of parallelflow.nn, expected some")
    for part in parts:
        part.context_group = context_group


def options_of(kind: type[Layer]) -> list[str]:
    """The keywords that a class of layers takes, those that it hands on to its bases included."""
    found: set[str] = set()
    for each in kind.__mro__:
        if issubclass(each, Layer) and "__init__" in vars(each):
            parameters = list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:]
            found |= {one.name for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)}
            if not any(one.kind is one.VAR_KEYWORD for one in parameters):
                break  # what its bases take, it does not hand on
    return sorted(found)


def head_size(hidden_size: int, num_heads: int) -> int:
    """The channels of a head, where ``num_heads`` share ``hidden_size``.

    Raises:
        ValueError: where they cannot.
    """
    expect_positive_integer("num_heads", num_heads)
    if hidden_size % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, expected a divisor of {hidden_size} channels, or head_dim")
    return hidden_size // num_heads


def low_rank(inputs: int, rank: int, outputs: int, bias: bool = False) -> nn.Sequential:
    """``x ↦ B A x + b`` with ``A [rank, inputs]``, ``B [outputs, rank]``: parameters ``0.weight``, ``1.weight``."""
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
