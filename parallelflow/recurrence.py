"""One token of the recurrence itself: what decoding runs, with no chunk around it."""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.problem import Inputs, Traits, sizes_of, without_autocast


def advance(inputs: Inputs, traits: Traits) -> tuple[Tensor, Tensor]:
    """The driver's one token (T = 1) applied to the initial state: output ``[B, 1, HV, V]``, state ``[B, HV, K, V]``.

    Plain differentiable operations: rows of a token that are simultaneous are one product, sequential ones a loop.
    """
    sizes = sizes_of(inputs)
    _, value_heads, key_dim, value_dim, dtype = sizes
    batch = inputs.query.shape[0]

    def rows(tensor: Tensor | None) -> Tensor | None:
        """``[B, 1, R, heads(, D)] -> [B, HV, R(, D)]`` in the compute dtype."""
        if tensor is None:
            return None
        tensor = tensor.squeeze(1).transpose(1, 2).to(dtype)
        return tensor if tensor.shape[1] == value_heads else tensor.repeat_interleave(value_heads // tensor.shape[1], 1)

    with without_autocast(inputs.query.device):
        if inputs.initial_state is None:
            state = inputs.query.new_zeros((batch, value_heads, key_dim, value_dim), dtype=dtype)
        else:
            state = inputs.initial_state.to(dtype)
        query = rows(inputs.query.unsqueeze(2))
        read = _scaled(rows(inputs.read), rows(inputs.read_coefficient), traits.read_sign)
        value = _scaled(rows(inputs.value), rows(inputs.value_coefficient), traits.value_sign)
        write = rows(inputs.write)
        lone_write = rows(inputs.lone_write)
        lone_value = _scaled(rows(inputs.lone_value), rows(inputs.lone_coefficient), traits.lone_sign)
        new = state
        if inputs.log_decay is not None:
            decay = inputs.log_decay.squeeze(1).to(dtype).exp()
            new = state * (decay[..., None, None] if decay.ndim == 2 else decay.unsqueeze(-1))

        def solve(row: slice, seen: Tensor) -> Tensor:
            assert read is not None
            solution = read[:, :, row] @ seen
            return solution if value is None else solution + value[:, :, row]

        if not traits.sequential:
            everything = slice(None)
            solution = None if read is None else solve(everything, state if traits.raw else new)
            if solution is not None:
                new = _write(new, write, solution)
            if lone_write is not None:
                new = _write(new, lone_write, lone_value)
        for place in range(traits.rank if traits.sequential else 0):
            if place in traits.positions:
                row = slice(traits.positions.index(place), traits.positions.index(place) + 1)
                assert write is not None
                new = _write(new, write[:, :, row], solve(row, new))
            else:
                row = slice(traits.lone_positions.index(place), traits.lone_positions.index(place) + 1)
                assert lone_write is not None
                assert lone_value is not None
                new = _write(new, lone_write[:, :, row], lone_value[:, :, row])
        scale = key_dim**-0.5 if traits.scale is None else traits.scale
        assert query is not None
        output = (query @ new) * scale
        return output.transpose(1, 2).to(inputs.query.dtype), new.clone() if new is inputs.initial_state else new


def _scaled(vectors: Tensor | None, coefficient: Tensor | None, sign: int) -> Tensor | None:
    if vectors is None:
        return None
    if coefficient is not None:
        vectors = vectors * (coefficient if coefficient.ndim == vectors.ndim else coefficient.unsqueeze(-1))
    return vectors if sign == 1 else -vectors


def _write(state: Tensor, write: Tensor | None, solution: Tensor | None) -> Tensor:
    """``S + Σ_j b_j x_jᵀ``; one row is an outer product."""
    assert write is not None
    assert solution is not None
    if write.shape[-2] == 1:
        return torch.addcmul(state, write.transpose(-1, -2), solution)
    return state + write.transpose(-1, -2) @ solution
