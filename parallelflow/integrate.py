"""The one place that puts the choices together: a driver, its discretised time, a solver, an aggregate, a backend."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from parallelflow.aggregate import AGGREGATES
from parallelflow.autograd import advance, nothing_to_record, run
from parallelflow.checks import (
    brief,
    expect_choice,
    expect_flag,
    expect_number,
    expect_offsets,
    expect_positive_integer,
    expect_starts,
    expect_tensor,
    show,
    state_name,
)
from parallelflow.discretizations import Discretization, DriverSource, discretize
from parallelflow.drivers.base import Factor, LowRankDriver, Row
from parallelflow.kernels import serving as short
from parallelflow.kernels.backend import elsewhere, fastest, kernels_of, refusal
from parallelflow.problem import Inputs, Traits, autocast_dtype, canonical, may_read
from parallelflow.serving import Store, through
from parallelflow.serving import advance as advance_short
from parallelflow.solvers import SOLVERS, cuda
from parallelflow.torch_backend import Plan

MOST_BOUNDARIES = 64  # sets of packed sequences' boundaries of which what kernels decide is kept
BACKENDS = ("auto", "torch", "cuda", "cpu", "triton", "hopper")


class Result(NamedTuple):
    """``output [B, T, HV, V]`` in the query's dtype; ``final_state [N, HV, K, V]``, at least float32, or None."""

    output: Tensor
    final_state: Tensor | None


class ResultWithStates(NamedTuple):
    """A ``Result``, and ``states [B, P, HV, K, V]`` after the requested numbers of tokens."""

    output: Tensor
    final_state: Tensor | None
    states: Tensor


class Options(TypedDict, total=False):
    """Keyword options of ``integrate``, taken by every model; ``functional`` adds its own. See ``integrate``."""

    discretization: Discretization | str | None
    scale: float | None
    initial_state: Tensor | None
    return_final_state: bool
    state_indices: Tensor | None
    in_place: bool
    accepted_tokens: Tensor | None
    cu_seqlens: Tensor | None
    cu_seqlens_cpu: Tensor | None
    chunk_size: int
    solver: Literal["tensor_inverse", "substitution", "sequential", "sigdelta"]
    aggregate: Literal["sequential", "associative", "segmented", "distributed"]
    backend: Literal["auto", "torch", "cuda", "cpu", "triton", "hopper"]
    batch_invariant: bool
    state_positions: Sequence[int] | None
    validate: bool | None
    context_group: Any
    context_lengths: Sequence[int] | None
    final_state_on: Literal["last", "all"]


def integrate(
    driver: LowRankDriver | DriverSource,
    query: Tensor,
    *,
    discretization: Discretization | str | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    state_indices: Tensor | None = None,
    in_place: bool = False,
    accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = 64,
    solver: str = "tensor_inverse",
    aggregate: str = "sequential",
    backend: str = "auto",
    batch_invariant: bool = True,
    state_positions: Sequence[int] | None = None,
    validate: bool | None = None,
    context_group: Any = None,
    context_lengths: Sequence[int] | None = None,
    final_state_on: str = "last",
) -> Result | ResultWithStates:
    """``o_t = scale · S_tᵀ q_t`` along the flow of ``driver``, all tokens at once.

    Args:
        driver: the model's rows and decay; or a ``DriverSource``, whose grid has T steps.
        query: ``[B, T, H, K]``; its dtype is the output's.
        discretization: how the driver's continuous system is stepped: ``euler`` (rows as they are; what None is),
            ``backward_euler``, ``cayley``, ``rk4``, ``exact``; with a ``DriverSource`` also ``magnus4``; or a
            ``Discretization``, which has a step size and a splitting too.
        scale: None is ``K^-½``.
        initial_state: ``[N, HV, K, V]``, float32 or float64; None is zero. N is B, or the number of packed sequences.
        return_final_state: whether to return the state after each sequence's last token.
        state_indices: ``[N]`` int32 or int64: ``initial_state`` is a store ``[slots, HV, K, V]``, and sequence n starts
            from slot ``state_indices[n]``; -1 is padding: zeros come out, and nothing is written.
        in_place: whether ``initial_state`` itself (of a store, the slots in use) becomes the final state, rounded to
            its dtype, and is what is returned for it. Not where gradients are recorded. A state that is updated in
            place, or a store, may also be bfloat16; all is computed in float32 nevertheless.
        accepted_tokens: ``[N]`` int32 or int64: the final state is that after sequence n's first ``accepted_tokens[n]``
            tokens; outputs are of all tokens. So tokens are verified with 0 (no state is written), and what was
            accepted of them is run again, before the next ones, with its number.
        cu_seqlens: ``[N + 1]`` int32 or int64, the packed sequences' first tokens, then T; B must be 1. An empty
            sequence keeps its initial state. On the query's device, or on the host.
        cu_seqlens_cpu: the same numbers on the host, which spares a device synchronisation (there is none either where
            the kernel for short sequences takes a line of at most 64 tokens).
        chunk_size: tokens a chunk, ≥ 1. Changes speed, not the result.
        solver: inside a chunk: ``tensor_inverse``, ``substitution``, ``sequential`` or ``sigdelta``. On an NVIDIA GPU
            ``substitution`` and ``sigdelta`` are kernels for chunks of up to 256 rows, up to 4 of a token at once.
        aggregate: across chunks: ``sequential``, ``associative`` or ``segmented``; or ``distributed``: across the ranks
            of ``context_group``, and ``sequential`` on each. A rank's tensors are its tokens, in the order of ranks, as
            many as it likes; ``cu_seqlens`` are of the whole line, on every rank; ``initial_state`` counts where a
            sequence's first token is (for B sequences side by side, on the first rank; None elsewhere will do). All
            ranks make the same calls, forward and backward.
        backend: ``torch`` (anywhere), ``cuda`` (the same with the solver ``sigdelta`` or ``substitution`` as a kernel,
            which ``auto`` takes for them where it fits), ``cpu`` (compiled at first use by the system's C++ compiler,
            on Linux), ``triton`` (any recent NVIDIA GPU), ``hopper`` (its scans need compute capability 9, 16 bits, K
            of 64 or 128, V a multiple of 64, and tiles that shared memory holds), or ``auto``: the fastest that fits,
            ``torch`` where none does. In 16 and 32 bits, K and V to 512, with ``chunk_size``, ``solver`` and
            ``aggregate`` left as they are (kernels choose their own chunks), ``cpu`` serves any rows up to 16 a token,
            ``triton`` and ``hopper`` all of these but rows applied one after another of which some only write; forced
            on anything else they raise. Up to 64 tokens a sequence without gradients,
            ``triton`` and ``auto`` on a GPU take the recurrence itself, in one kernel.
        batch_invariant: whether a sequence has the same bits whatever else is in the batch. False lets the GPU kernels
            cut sequences into segments by how many there are, which may be faster; the torch and CPU backends have
            nothing to gain, and their results do not change.
        state_positions: increasing numbers of tokens after which the state is wanted as well (prefix caching).
        validate: whether values are checked (log-decays ≤ 0 and not NaN, monotone ``cu_seqlens``), which reads them on
            the host; None checks eagerly on the CPU only. Over ranks, also whether all have the same shapes and
            settings, which is checked unless it is False.
        context_group: a ``ProcessGroup``, or a ``DeviceMesh`` of one dimension.
        context_lengths: the tokens of each of its ranks, where they are known: spares packed sequences an exchange.
        final_state_on: over ranks, which of them return the final states: the ``last`` one, or ``all``.

    Returns:
        ``Result(output [B, T, HV, V], final_state [N, HV, K, V] or None)``; with ``state_positions`` a
        ``ResultWithStates``. All differentiable, twice in eager mode. States and sums are in
        the widest input dtype, at least float32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.

    Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492).
    """
    if not isinstance(driver, (LowRankDriver, DriverSource)):
        raise TypeError(f"driver: got {type(driver).__name__}, expected a LowRankDriver or a DriverSource")
    _check_flags(return_final_state, in_place, batch_invariant, validate)
    store = Store(state_indices, accepted_tokens, in_place)
    if discretization is not None and isinstance(driver, LowRankDriver):
        # Shapes are checked before rows are combined.
        canonical(*_autocast(driver, query), initial_state, scale, store.stored())
    if context_group is not None or aggregate == "distributed":
        if state_positions is not None:
            raise ValueError("state_positions: got some with a context_group, expected none")
        if not store.plain():
            raise ValueError(
                "context_group: got one with state_indices, in_place or accepted_tokens, expected none of those"
            )
        return _over_ranks(
            driver, query, discretization, initial_state, cu_seqlens, cu_seqlens_cpu,
            {"scale": scale, "chunk_size": chunk_size, "solver": solver, "aggregate": aggregate, "backend": backend},
            validate, context_group, context_lengths, return_final_state, final_state_on,
        )  # fmt: skip
    for name, value, usual in (("context_lengths", context_lengths, None), ("final_state_on", final_state_on, "last")):
        if value is not usual and value != usual:
            raise ValueError(f"{name}: got {value!r} without a context_group, of whose ranks it is; expected {usual!r}")
    driver = discretize(driver, discretization)
    check_choices(chunk_size, scale, solver, aggregate, [*AGGREGATES, "distributed"], backend)
    if state_positions is not None:
        if not store.plain():
            raise ValueError(
                "state_positions: got some with state_indices, in_place or accepted_tokens, expected one or the other"
            )
        return _with_states(
            driver, query, state_positions, cu_seqlens, cu_seqlens_cpu, initial_state, return_final_state,
            {"scale": scale, "chunk_size": chunk_size, "solver": solver, "aggregate": aggregate, "backend": backend,
             "batch_invariant": batch_invariant, "validate": validate},
        )  # fmt: skip
    driver, query = _autocast(driver, query)
    inputs, traits, decided = canonical(driver, query, initial_state, scale, store.stored())
    checking = may_read(query) if validate is None else validate
    choice = (backend, chunk_size, solver, aggregate)
    if choice not in decided:
        plan = _with_kernel(backend, inputs, traits, Plan(int(chunk_size), solver, aggregate))
        decided[choice] = plan, _choose_short(backend, inputs, traits, plan)
    plan, is_short = decided[choice]
    if torch.compiler.is_compiling() and store.plain() and query.shape[1] != 1:
        is_short = False  # a graph of many lengths is not split at 64 tokens
    is_short = is_short and nothing_to_record(inputs)
    on_host = cu_seqlens is not None and (checking or not is_short or query.shape[1] > short.LONGEST)
    starts = _sequence_starts(inputs, cu_seqlens, cu_seqlens_cpu, checking, on_host, store)
    if accepted_tokens is not None and not return_final_state and not in_place:
        raise ValueError(
            "accepted_tokens: got some without return_final_state or in_place, expected one of them: only the final "
            "state depends on them"
        )
    if checking:
        _check_log_decay(driver.log_decay)
    if cu_seqlens is not None and cu_seqlens.device != query.device:
        cu_seqlens = cu_seqlens.to(query.device)  # given on the host, which kernels do not read
    if is_short and _longest(query, starts) <= short.LONGEST and (not store.stored() or short.fits(initial_state)):
        said, state = advance_short(inputs, traits, store, cu_seqlens, decided)
        return Result(said, state if return_final_state else None)
    if (choice, "tier") not in decided:
        decided[choice, "tier"] = _choose(backend, inputs, traits, plan)
    tier = decided[choice, "tier"]
    of_one_kind = None
    if not torch.compiler.is_compiling():
        of_one_kind = _of_one_kind(decided, (choice, batch_invariant, store.indices is None), starts)

    def engine(inputs: Inputs, final_state: bool = True) -> tuple[Tensor, Tensor | None]:
        if query.shape[1] == 1 and cu_seqlens is None and backend in ("auto", "torch"):
            return advance(inputs, traits, tier)
        return run(inputs, traits, plan, starts, cu_seqlens, tier, batch_invariant, final_state, of_one_kind)

    if store.plain():
        output, final = engine(inputs, return_final_state)
    else:
        output, final = through(engine, inputs, store, cu_seqlens)
    return Result(output, final if return_final_state else None)


def _of_one_kind(decided: dict[Any, Any], choice: tuple, starts: list[int] | None) -> dict[Any, Any]:
    """What is decided for tensors of one kind and a choice: with the same boundaries of packed sequences, of which the
    last few are known."""
    every = decided.setdefault(("boundaries", choice), {})
    key = None if starts is None else tuple(starts)
    if key not in every and len(every) >= MOST_BOUNDARIES:
        del every[next(iter(every))]
    return every.setdefault(key, {})


def _choose_short(backend: str, inputs: Inputs, traits: Traits, plan: Plan) -> bool:
    """Whether the kernel for short sequences takes this problem, where it is short and no gradient is recorded."""
    if backend not in ("auto", "triton") or elsewhere("triton", inputs) is not None:
        return False
    if backend == "auto" and inputs.query.device.type != "cuda":
        return False
    return plan == Plan() and short.refusal(inputs, traits) is None


def _longest(query: Tensor, starts: list[int] | None) -> int:
    """A number that no sequence's length exceeds."""
    return query.shape[1] if starts is None else max(last - first for first, last in pairwise(starts))


@_disable_dynamo  # torch.compiler's own would import the compiler
def _over_ranks(
    driver: LowRankDriver | DriverSource,
    query: Tensor,
    discretization: Discretization | str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    options: dict[str, Any],
    validate: bool | None,
    context_group: Any,
    context_lengths: Sequence[int] | None,
    return_final_state: bool,
    final_state_on: str,
) -> Result:
    """``integrate`` with ``aggregate="distributed"``. What is wrong on one rank is raised on all."""
    from parallelflow import distributed  # torch.distributed takes a while to import, and is not everywhere

    context = distributed.Context.of(context_group)
    try:
        check_choices(aggregates=("distributed",), **options)
        expect_choice("final_state_on", final_state_on, distributed.FINAL_STATE_ON)
        driver, query = _autocast(discretize(driver, discretization), query)
        inputs, traits, _ = canonical(driver, query, initial_state, options["scale"])
        starts = None
        if cu_seqlens is not None:
            expect_tensor("cu_seqlens", cu_seqlens)
            starts = (cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu).tolist()
        distributed.check(context, inputs, starts, context_lengths)
        if may_read(query) if validate is None else validate:
            _check_log_decay(driver.log_decay)
        plan = Plan(int(options["chunk_size"]), options["solver"])
        plan = _with_kernel(options["backend"], inputs, traits, plan)
        if inputs.query.numel():
            _choose(options["backend"], inputs, traits, plan)  # raises where a forced one does not fit
    except (TypeError, ValueError) as error:
        if validate is False:
            raise
        distributed.refuse(context, error, query.device)

    def choose(inputs: Inputs) -> str:
        """With more value channels than the model has, a forced backend may not fit: the flow is then made in torch."""
        tier, why = _meant(options["backend"], inputs, traits, plan)
        return kernels_of(tier, inputs, traits) if why is None else "torch"

    return Result(*distributed.run(
        context, inputs, traits, plan, choose, cu_seqlens=starts, context_lengths=context_lengths,
        return_final_state=return_final_state, final_state_on=final_state_on,
        settings={**options, "discretization": str(discretization)}, checking=validate is not False,
    ))  # fmt: skip


def _check_flags(return_final_state: bool, in_place: bool, batch_invariant: bool, validate: bool | None) -> None:
    expect_flag("return_final_state", return_final_state)
    expect_flag("in_place", in_place)
    expect_flag("batch_invariant", batch_invariant)
    if validate is not None and not isinstance(validate, bool):
        raise TypeError(f"validate: got {validate!r}, expected True, False or None")


def check_choices(
    chunk_size: int, scale: float | None, solver: str, aggregate: str, aggregates: Sequence[str], backend: str
) -> None:
    """TypeError or ValueError, naming the option, for what it cannot be."""
    expect_positive_integer("chunk_size", chunk_size)
    if scale is not None:
        expect_number("scale", scale)
        if not torch.compiler.is_compiling() and not math.isfinite(scale):
            raise ValueError(f"scale: got {scale}, expected a finite number")
    expect_choice("solver", solver, SOLVERS)
    expect_choice("aggregate", aggregate, aggregates)
    expect_choice("backend", backend, BACKENDS)


def _check_log_decay(log_decay: Tensor | None) -> None:
    if log_decay is not None and not bool((log_decay <= 0).all()):
        raise ValueError(
            "log_decay: got positive or NaN values, expected natural logarithms ≤ 0 (-inf resets the state)"
        )


def _with_kernel(backend: str, inputs: Inputs, traits: Traits, plan: Plan) -> Plan:
    """The plan; with its solver as a CUDA kernel where there is one, and ``backend`` allows it."""
    if backend not in ("auto", "cuda"):
        return plan
    rank, tokens = len(traits.positions), plan.chunk_size
    if traits.sequential:
        rank, tokens = min(rank, 1), tokens * rank
    why = cuda.refusal(plan.solver, inputs.query.device, tokens, rank)
    if why is None:
        return replace(plan, compiled=True)
    if backend == "cuda":
        raise ValueError(f"backend: got 'cuda' with {why}")
    return plan


def _choose(backend: str, inputs: Inputs, traits: Traits, plan: Plan) -> str:
    """``torch``, or the kernels that run."""
    tier, why = _meant(backend, inputs, traits, plan)
    if why is None:
        return kernels_of(tier, inputs, traits)
    if backend == "auto":
        return "torch"
    raise ValueError(f"backend: got {backend!r} with {why}")


def _meant(backend: str, inputs: Inputs, traits: Traits, plan: Plan) -> tuple[str, str | None]:
    """The tier that a choice of backend means, and why it cannot run; None where it can."""
    tier = fastest(inputs, traits) if backend == "auto" else backend
    tier = "torch" if plan.compiled else tier
    if tier == "torch":
        return tier, None
    return tier, refusal(tier, inputs, traits) if plan == Plan() else _chosen(plan)


def _chosen(plan: Plan) -> str:
    """What was chosen that kernels choose themselves."""
    usual = Plan()
    names = [name for name in ("chunk_size", "solver", "aggregate") if getattr(plan, name) != getattr(usual, name)]
    came, expected = (", ".join(f"{name}={getattr(each, name)!r}" for name in names) for each in (plan, usual))
    return f"{came}, expected {expected}, as it is unless given: kernels choose for themselves"


def _sequence_starts(
    inputs: Inputs,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    checking: bool,
    on_host: bool,
    store: Store,
) -> list[int] | None:
    """The packed sequences' boundaries on the host, checked; None for a regular batch, or where nobody needs them."""
    batch, time = inputs.query.shape[:2]
    if cu_seqlens is None:
        if cu_seqlens_cpu is not None:
            raise ValueError("cu_seqlens_cpu: got a tensor without cu_seqlens, expected both or neither")
        sequences = batch
    else:
        expect_offsets(cu_seqlens, cu_seqlens_cpu, inputs.query)
        sequences = cu_seqlens.shape[0] - 1
    if not store.plain():
        store.check(inputs.initial_state, inputs.query, cu_seqlens, checking)
    if inputs.initial_state is not None and store.indices is None and inputs.initial_state.shape[0] != sequences:
        raise ValueError(
            f"{state_name()}: got shape {show(inputs.initial_state)}, expected one state a sequence, N = {sequences}"
        )
    if cu_seqlens is None or torch.compiler.is_compiling() or not (on_host or cu_seqlens_cpu is not None):
        return None
    starts = (cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu).tolist()
    expect_starts(starts, time)
    if checking and cu_seqlens_cpu is not None and cu_seqlens.tolist() != starts:
        raise ValueError(f"cu_seqlens_cpu: got {brief(starts)}, expected cu_seqlens' {brief(cu_seqlens.tolist())}")
    return starts


def _autocast(driver: LowRankDriver, query: Tensor) -> tuple[LowRankDriver, Tensor]:
    """Under autocast, float32 vectors take its dtype as the factors of a matrix product would; coefficients, decays and
    states keep theirs. Ties stay ties."""
    expect_tensor("query", query)
    if autocast_dtype(query) == query.dtype:
        return driver, query

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(autocast_dtype(tensor))

    rows = []
    for row in driver.rows:
        write = cast(row.write)
        read, value = row.read, row.value
        if read is not None:
            read = read._replace(vector=write if read.vector is row.write else cast(read.vector))
        if value is not None:
            value = value._replace(vector=cast(value.vector))
        rows.append(Row(write, read, value))
    return LowRankDriver(tuple(rows), driver.log_decay, driver.order, driver.reads), cast(query)


def _with_states(
    driver: LowRankDriver,
    query: Tensor,
    positions: Sequence[int],
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    options: dict,
) -> ResultWithStates:
    """Runs from position to position, carrying the state: exact, whatever the chunks.

    On packed sequences a position counts tokens of the line; its state is that of the sequence it ends in.
    """
    inputs = canonical(driver, query, initial_state, None).inputs
    starts = _sequence_starts(inputs, cu_seqlens, cu_seqlens_cpu, True, True, Store())
    time = query.shape[1]
    try:
        places = [operator.index(position) for position in positions]
    except TypeError:
        raise TypeError(f"state_positions: got {positions!r}, expected a sequence of integers") from None
    if not places:
        raise ValueError("state_positions: got none, expected at least one number of tokens")
    if any(later < earlier for earlier, later in pairwise([0, *places, time])):
        raise ValueError(f"state_positions: got {brief(places)}, expected numbers that increase from 0 to T = {time}")
    if starts is not None and places[0] == 0:
        raise ValueError("state_positions: got 0 with packed sequences, expected positions after at least one token")
    outputs, states = [], []
    current = initial_state  # of every sequence, up to the last position
    for start, stop in pairwise([0, *places, time]):
        piece = None
        if starts is not None:  # what each sequence has between the two positions
            bounds = [min(max(bound, start), stop) - start for bound in starts]
            piece = torch.tensor(bounds, dtype=torch.int64, device=query.device)
        output, current = integrate(
            _slice(driver, start, stop),
            query[:, start:stop],
            initial_state=current,
            return_final_state=True,
            cu_seqlens=piece,
            **options,
        )[:2]
        assert current is not None
        outputs.append(output)
        if starts is None:
            states.append(current)
        else:
            inside = max(sequence for sequence, bound in enumerate(starts[:-1]) if bound < max(stop, 1))
            states.append(current[inside : inside + 1])
    return ResultWithStates(torch.cat(outputs, 1), current if return_final_state else None, torch.stack(states[:-1], 1))


def _slice(driver: LowRankDriver, start: int, stop: int) -> LowRankDriver:
    """The driver on tokens ``start`` to ``stop``; ties stay ties."""

    def cut(factor: Factor | None) -> Factor | None:
        if factor is None:
            return None
        coefficient = factor.coefficient
        return Factor(
            factor.vector[:, start:stop], None if coefficient is None else coefficient[:, start:stop], factor.sign
        )

    rows = []
    for row in driver.rows:
        read, value = cut(row.read), cut(row.value)
        write = row.write[:, start:stop]
        if read is not None and row.read is not None:
            if row.read.vector is row.write:
                write = read.vector
            if value is not None and row.value is not None and row.value.coefficient is row.read.coefficient:
                value = value._replace(coefficient=read.coefficient)
        rows.append(Row(write, read, value))
    decay = None if driver.log_decay is None else driver.log_decay[:, start:stop]
    return LowRankDriver(tuple(rows), decay, driver.order, driver.reads)
