"""A decay or a β for every value channel: the columns of the state are independent, so each becomes a head of its own.

``S ← S diag(e^gv)`` multiplies columns, and the engine's decays multiply rows. With one column a head the value
``[B, T, HV, V]`` becomes ``[B, T, HV · V, 1]``, the key heads stay shared, and a column's decay is a head's.
"""

from __future__ import annotations

from torch import Tensor

from parallelflow.compat.fla.call import Mapped


def flat(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """One number a value channel, ``[B, T, HV, V]``, as one number a head, ``[B, T, HV · V]``."""
    if tensor.shape != value.shape:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected the values', {list(value.shape)}")
    return tensor.flatten(2, 3)


def repeated(tensor: Tensor, columns: int) -> Tensor:
    """What the columns of a head share, ``[B, T, HV, …]``, for every column."""
    return tensor.repeat_interleave(columns, 2)


def by_columns(mapped: Mapped) -> Mapped:
    """The same model with every value column a head of its own; its other tensors are a column's already."""
    value = mapped.tensors["value"]
    heads, columns = value.shape[2:]

    def enter(state: Tensor | None) -> Tensor | None:
        return None if state is None else state.transpose(-1, -2).flatten(1, 2).unsqueeze(-1)

    def leave(output: Tensor, state: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        output = output.squeeze(-1).unflatten(2, (heads, columns))
        if not wanted:
            return output, None
        return output, state.squeeze(-1).unflatten(1, (heads, columns)).transpose(-1, -2).contiguous()

    return Mapped(mapped.model, {**mapped.tensors, "value": value.flatten(2, 3).unsqueeze(-1)}, enter, leave)
