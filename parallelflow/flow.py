"""The flow of an affine system: ``S_t = P S_s + H``, and how flows compose.

P, H and the states are of one floating dtype: that in which states are computed, at least float32.

Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492), section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.checks import expect_kind, expect_tensor, show
from parallelflow.lanes import Lanes


class Flow(NamedTuple):
    """``S -> P S + H`` on states ``S [..., K, V]``.

    ``transition`` (P) is as small as the driver allows, told by its number of axes:

    * ``[...]``: a scalar (linear attention, RetNet, Mamba-2),
    * ``[..., K]``: a diagonal (gated linear attention),
    * ``[..., K, K]``: dense (everything with reads).

    ``source`` (H) is ``[..., K, V]``. All leading axes are batch axes.

    Raises:
        TypeError, ValueError: from ``apply`` and ``then``, for what does not fit.
    """

    transition: Tensor
    source: Tensor

    def apply(self, state: Tensor) -> Tensor:
        """``P S + H`` of ``state [..., K, V]``."""
        self._expect("state", state)
        return _act(self.transition, state, self.source.ndim) + self.source

    def then(self, later: Flow) -> Flow:
        """This flow first, ``later`` second: ``(P2 P1, P2 H1 + H2)``. Mixed kinds of P give the larger kind."""
        expect_kind("later", later, Flow, "a Flow")
        self._expect("later.source", later.source)
        later._expect("later.source", later.source)
        rank = self.source.ndim
        first, second = self.transition, later.transition
        if second.ndim < first.ndim:  # P2 scalar or diagonal acting on the columns of a larger P1
            second = second.reshape(second.shape + (1,) * (first.ndim - second.ndim))
            transition = second * first
        elif first.ndim < second.ndim:  # P1 scales P2, or P2's columns
            if first.ndim == rank - 1:
                transition = second * first.unsqueeze(-2)
            else:
                transition = second * first.reshape(first.shape + (1,) * (second.ndim - first.ndim))
        elif first.ndim == rank:
            transition = second @ first
        else:
            transition = second * first
        return Flow(transition, later.apply(self.source))

    def _expect(self, name: str, states: Tensor) -> None:
        """TypeError or ValueError unless P and H are a flow, and ``states`` what it acts on."""
        for part, tensor in (("transition", self.transition), ("source", self.source), (name, states)):
            expect_tensor(part, tensor)
        size, rank = self.source.shape[-2:], self.source.ndim
        axes = self.transition.ndim - rank + 2
        if rank < 2 or not 0 <= axes <= 2 or any(each != size[0] for each in self.transition.shape[rank - 2 :]):
            raise ValueError(
                f"transition: got shape {show(self.transition)} beside a source {show(self.source)}, expected [...], "
                "[..., K] or [..., K, K] beside [..., K, V]"
            )
        if states.shape[-2:] != size:
            raise ValueError(f"{name}: got shape {show(states)}, expected [..., K, V] with [K, V] = {list(size)}")
        if not self.transition.dtype == self.source.dtype == states.dtype:
            raise TypeError(f"{name}: got dtype {states.dtype}, expected the flow's, {self.source.dtype}")

    def take(self, places: list[int]) -> Flow:
        """The flows at some places of the first axis."""
        index = _index(places, self.source.device)
        return Flow(self.transition[index], self.source[index])

    @staticmethod
    def identity(like: Flow) -> Flow:
        """``(I, 0)`` in the kind, shape, dtype and device of ``like``."""
        transition = torch.ones_like(like.transition)
        if like.transition.ndim == like.source.ndim:
            transition = torch.diag_embed(torch.ones_like(like.transition[..., 0]))
        return Flow(transition, torch.zeros_like(like.source))


def compose(first: Flow, second: Flow) -> Flow:
    """The flow over ``[s, u]`` from those over ``[s, t]`` and ``[t, u]`` (Chen's relation).

    Raises:
        TypeError, ValueError: for what is no ``Flow``, and for flows on states of other sizes or dtypes.
    """
    expect_kind("first", first, Flow, "a Flow")
    return first.then(second)


def entry_states(flows: Flow, lanes: Lanes, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each flow, and after the last one, of every lane: an exclusive scan in log depth.

    ``flows`` holds M flows on the axis of ``lanes``; ``initial [lanes, ..., K, V]`` is each lane's entry, in order.
    Neighbours are composed in pairs, the half as long problem is solved, and the states between are filled in: 2M
    compositions and applications in 2 log2(longest lane) dependent stages. Lanes are never mixed, so a NaN in one
    stays there.

    Returns ``(entries [M, ..., K, V], final [lanes, ..., K, V])``.
    """
    device = initial.device
    if lanes.steps == 1:
        return initial, flows.apply(initial)
    halved, first, second, alone = lanes.halve()
    pairs = compose(flows.take(first), flows.take(second))
    heads = first
    if alone:  # put the unpaired back among the pairs, in the order of their places
        lone = flows.take(alone)
        pairs = Flow(torch.cat((pairs.transition, lone.transition)), torch.cat((pairs.source, lone.source)))
        heads = first + alone
        order = sorted(range(len(heads)), key=heads.__getitem__)
        pairs, heads = pairs.take(order), [heads[place] for place in order]
    evens, final = entry_states(pairs, halved, initial)
    rank = {place: position for position, place in enumerate(heads)}
    odds = flows.take(first).apply(evens[_index([rank[place] for place in first], device)])
    entries = torch.cat((evens, odds))
    return entries[torch.argsort(_index(heads + second, device))], final


def _act(transition: Tensor, state: Tensor, rank: int) -> Tensor:
    if transition.ndim == rank:
        return transition @ state
    return transition.reshape(transition.shape + (1,) * (rank - transition.ndim)) * state


def _index(places: list[int], device: torch.device) -> Tensor:
    return torch.tensor(places, dtype=torch.long, device=device)
