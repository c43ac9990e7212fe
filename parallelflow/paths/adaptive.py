"""Steps as fine as a tolerance asks: all solved at once, those that fail refined, and again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.checks import expect_floating, expect_kind, expect_number, expect_positive_integer, expect_shape, show
from parallelflow.discretizations import Discretization, DriverSource, discretize
from parallelflow.discretizations.base import identity_like
from parallelflow.discretizations.rows import Stack
from parallelflow.drivers.base import LowRankDriver
from parallelflow.flow import Flow, compose, entry_states
from parallelflow.integrate import integrate
from parallelflow.lanes import Lanes

MOST_PARTS = 8
"""Into which one step is cut at a time."""


class Refinement(NamedTuple):
    """A source on a finer grid; ``ends [T]``: the number of its steps after which each of the old ones ends.

    ``error``: the estimate for the worst state on the way, as a share of what was allowed (≤ 1); ``rounds``: how often
    all steps were solved.
    """

    source: DriverSource
    ends: Tensor
    error: float
    rounds: int


class Solution(NamedTuple):
    """``output [B, T, HV, V]`` and ``final_state [B, HV, K, V]`` at the ends of the steps asked for."""

    output: Tensor
    final_state: Tensor
    refinement: Refinement


def solve(
    source: DriverSource,
    query: Tensor,
    *,
    discretization: Discretization | str = "magnus4",
    relative_tolerance: float = 1e-5,
    absolute_tolerance: float = 1e-8,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    max_steps: int = 16384,
) -> Solution:
    """``o_t = scale · S_tᵀ q_t`` at the end of every step of the source's grid, with states to within a tolerance.

    The grid is refined (``refine``), then the steps are made in parallel. Differentiable, for a fixed grid.

    Args:
        query: ``[B, T, H, K]``, T the steps of the source's grid.
        scale: None is ``K^-½``.
        source, discretization, relative_tolerance, absolute_tolerance, initial_state, max_steps: as in ``refine``.

    Raises:
        TypeError, ValueError: for what does not fit, naming the argument.
        RuntimeError: where the tolerance cannot be held.
    """
    expect_kind("source", source, DriverSource, "a DriverSource")
    expect_floating("query", query)
    steps = source.grid.shape[-1] - 1
    if query.ndim != 4 or query.shape[1] != steps:
        raise ValueError(f"query: got shape {show(query)}, expected [B, T, H, K] with the grid's T = {steps}")
    refinement = refine(
        source,
        discretization=discretization,
        relative_tolerance=relative_tolerance,
        absolute_tolerance=absolute_tolerance,
        initial_state=initial_state,
        max_steps=max_steps,
    )
    places = refinement.ends - 1
    fine = refinement.source.grid.shape[-1] - 1
    queries = query.new_zeros(query.shape[0], fine, *query.shape[2:]).index_copy(1, places, query)
    result = integrate(
        refinement.source, queries, discretization=discretization, initial_state=initial_state, scale=scale,
        return_final_state=True,
    )  # fmt: skip
    assert result.final_state is not None
    return Solution(result.output.index_select(1, places), result.final_state, refinement)


@torch.no_grad()
def refine(
    source: DriverSource,
    *,
    discretization: Discretization | str = "magnus4",
    relative_tolerance: float = 1e-5,
    absolute_tolerance: float = 1e-8,
    initial_state: Tensor | None = None,
    max_steps: int = 16384,
) -> Refinement:
    """The source on a grid so fine that a discretisation holds a tolerance.

    Every round makes all steps at once, and all of them again as two halves. The difference is the estimate: of a
    step's own error, ``‖(P - P½P½) S + …‖``, which may be the tolerance times the step's share of the whole time; and,
    from two scans over all steps in log depth, of what has come of all errors on the way, which may be the tolerance.
    Steps that fail are cut, into up to 8 parts. What is returned has the halves for steps, so it is better than asked
    for: by 2^p, p the order.

    Args:
        source: the drivers' rates, and the steps to begin with; what passes between their nodes unseen stays unseen.
        discretization: whose steps these are; for a decay a key channel ``Discretization("exact", "strang")``.
        relative_tolerance, absolute_tolerance: a state may be off by ``absolute + relative · max_t ‖S_t‖``, in the
            Frobenius norm, for each sequence and head.
        initial_state: ``[B, HV, K, V]``; None is zero.
        max_steps: more are not tried.

    Raises:
        TypeError, ValueError: for tolerances that are none, and what the discretisation cannot take.
        RuntimeError: where more than ``max_steps`` steps, or steps below the resolution of the grid's dtype, would be
            needed; saying where, and how far off it is.
    """
    expect_kind("source", source, DriverSource, "a DriverSource")
    for name, tolerance in (("relative_tolerance", relative_tolerance), ("absolute_tolerance", absolute_tolerance)):
        expect_number(name, tolerance)
        if not tolerance >= 0:
            raise ValueError(f"{name}: got {tolerance}, expected a number ≥ 0")
    if relative_tolerance == absolute_tolerance == 0:
        raise ValueError("relative_tolerance: got 0 with absolute_tolerance 0, expected one of them above 0")
    expect_positive_integer("max_steps", max_steps)
    if isinstance(discretization, str):
        discretization = Discretization(discretization)
    count = source.grid.shape[-1] - 1
    if 2 * count > max_steps:
        raise ValueError(
            f"max_steps: got {max_steps}, expected at least {2 * count}: halves of the {count} steps there are"
        )
    ends = torch.arange(1, count + 1, device=source.grid.device)
    twice = torch.full_like(ends, 2)
    strictness, rounds = 1.0, 0
    while True:
        rounds += 1
        halved = DriverSource(source.rates, _cut(source.grid, twice))
        whole, halves = (_flows(discretize(each, discretization)) for each in (source, halved))
        own, total = _errors(source, whole, halves, initial_state, relative_tolerance, absolute_tolerance)
        worst = total.max().item()
        if bool((own * strictness <= 1).all()):
            if worst <= 1:
                return Refinement(halved, 2 * ends, worst, rounds)
            strictness *= max(2.0, worst)  # each step is good enough, what comes of them is not
        ratio = (own * strictness).nan_to_num(nan=torch.inf)
        # A step's error goes with its length to the power p + 1, what it may be with its length: n parts gain n^p.
        parts = (1.1 * ratio ** (1 / discretization.order)).ceil().clamp(1, MOST_PARTS).long()
        parts = torch.where(ratio > 1, parts.clamp(min=2), 1)
        finest = ((source.steps / parts).abs() + torch.where(parts == 1, torch.inf, 0)).min()
        before, count = count, int(parts.sum())
        why = None
        if 2 * count > max_steps:
            why = f"more than {max_steps} steps"
        elif count == before or finest < 16 * torch.finfo(source.grid.dtype).eps * source.grid.abs().max():
            why = f"more digits than {source.grid.dtype} and the states' dtype have"
        if why is not None:
            place = source.grid[..., int(ratio.argmax())].flatten()[0].item()
            raise RuntimeError(
                f"relative_tolerance: got {relative_tolerance:g} with absolute_tolerance {absolute_tolerance:g}, which "
                f"needs {why}: after {rounds} rounds the error is {worst:.2g} times what is allowed; the worst step "
                f"begins at {place:g}"
            )
        source, ends = DriverSource(source.rates, _cut(source.grid, parts)), parts.cumsum(0)[ends - 1]
        twice = torch.full((count,), 2, device=ends.device)


def _errors(
    source: DriverSource, whole: Flow, halves: Flow, initial_state: Tensor | None, relative: float, absolute: float
) -> tuple[Tensor, Tensor]:
    """Each step's own error and the error so far, ``[T]``, as shares of what is allowed: the worst of all heads."""
    pairs = compose(Flow(*(x[:, 0::2] for x in halves)), Flow(*(x[:, 1::2] for x in halves)))
    batch, steps, heads, size, width = pairs.source.shape
    state = pairs.source.new_zeros(batch, heads, size, width) if initial_state is None else initial_state
    expect_floating("initial_state", state)
    expect_shape("initial_state", state, "[B, HV, K, V]", (batch, heads, size, width))
    state = state.to(pairs.source.dtype)
    entries, after = _states(pairs, state)
    norm = torch.linalg.matrix_norm
    largest = norm(after).nan_to_num(0.0, posinf=0.0).amax(1)
    allowed = absolute + relative * torch.maximum(largest, norm(state))  # [B, HV]
    own = norm((whole.transition - pairs.transition) @ entries + whole.source - pairs.source)
    rounding = 8 * torch.finfo(own.dtype).eps * norm(after)  # which no shorter step would spare
    own = (own - rounding.nan_to_num(0.0, posinf=0.0)).clamp(min=0) / allowed[:, None]
    total = norm(_states(whole, state)[1] - after) / allowed[:, None]
    share = (source.steps / (source.grid[..., -1:] - source.grid[..., :1])).nan_to_num(0.0)
    share = share.expand(batch, -1)[..., None].to(own.dtype)
    known = (share > 0) & entries.isfinite().all(-1).all(-1)  # after a state that is not finite nothing can be said
    own = torch.where(known, own / torch.where(known, share, 1), 0)
    return own.amax((0, 2)), total.amax((0, 2)).nan_to_num(nan=torch.inf)


def _flows(driver: LowRankDriver) -> Flow:
    """Every token's flow, dense: ``P [B, T, HV, K, K]``, ``H [B, T, HV, K, V]``."""
    stack = Stack(driver)
    assert stack.value is not None
    read, value = stack.read, stack.value
    if driver.order == "sequential":  # row j reads what the rows before it have written
        product = stack.product
        inverse = torch.linalg.inv(identity_like(product) - product.tril(-1))
        read, value = inverse @ read, inverse @ value
    rows = stack.write.mT @ read
    identity = identity_like(rows)
    decay = identity
    if driver.log_decay is not None:
        factor = driver.log_decay.to(rows.dtype).exp()
        decay = factor[..., None, None] * identity if factor.ndim == 3 else torch.diag_embed(factor)
    return Flow(decay + (rows if driver.reads == "raw" else rows @ decay), stack.write.mT @ value)


def _states(flows: Flow, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The states before and after every step, ``[B, T, HV, K, V]``, by a scan in log depth."""
    batch, steps = flows.source.shape[:2]
    flat = Flow(*(x.transpose(0, 1).flatten(0, 1) for x in flows))  # step by step, the sequences side by side
    entries, final = entry_states(flat, Lanes([steps] * batch), initial)
    entries = entries.unflatten(0, (steps, batch)).transpose(0, 1)
    return entries, torch.cat((entries[:, 1:], final[:, None]), 1)


def _cut(grid: Tensor, parts: Tensor) -> Tensor:
    """Step n in ``parts[n]`` equal steps."""
    step = torch.arange(parts.shape[0], device=grid.device).repeat_interleave(parts)
    first = torch.cat((parts.new_zeros(1), parts.cumsum(0)[:-1]))
    share = ((torch.arange(step.shape[0], device=grid.device) - first[step]) / parts[step]).to(grid.dtype)
    left, right = grid[..., :-1][..., step], grid[..., 1:][..., step]
    return torch.cat((torch.lerp(left, right, share), grid[..., -1:]), -1)
