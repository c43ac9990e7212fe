"""Every discretisation is the dense transition it states: output, state and gradients, for every driver.

The references form K × K transitions and matrix exponentials in float64, from the driver's rows written out; they share
no code with the package's R × R algebra.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import parallelflow as pf
from parallelflow import Discretization, Factor, LowRankDriver, Row
from parallelflow.discretizations.phi import moments, phi1, phi1_matrix
from parallelflow.testing import Sizes, make_inputs
from tests.cases import AGGREGATES, SOLVERS, assert_close, gradients, require_grad

FROZEN = ("euler", "backward_euler", "cayley", "rk4", "exact")
F64 = torch.float64


# --- the references -------------------------------------------------------------------------------------------------


def dense_rows(driver: LowRankDriver, heads: int) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """a, b ``[B, T, HV, K]`` and u ``[B, T, HV, V]`` of every row, written out."""

    def per_head(x: Tensor, axis: int) -> Tensor:
        return x if x.shape[axis] == heads else x.repeat_interleave(heads // x.shape[axis], axis)

    reads, writes, values = [], [], []
    for row in driver.rows:
        count = row.write.shape[2] if row.write.ndim == 5 else None
        for j in [None] if count is None else range(count):
            pick = lambda x, j=j: x if j is None else x[:, :, j]  # noqa: E731

            def whole(factor: Factor | None, pick=pick) -> Tensor | None:
                if factor is None:
                    return None
                vector = per_head(pick(factor.vector), 2)
                if factor.coefficient is not None:
                    number = per_head(pick(factor.coefficient), 2)
                    vector = vector * (number if number.ndim == vector.ndim else number[..., None])
                return factor.sign * vector

            writes.append(per_head(pick(row.write), 2))
            read = whole(row.read)
            reads.append(torch.zeros_like(writes[-1]) if read is None else read)
            values.append(whole(row.value))
    return reads, writes, values


def outer(x: Tensor, y: Tensor) -> Tensor:
    return x[..., :, None] * y[..., None, :]


def affine_exponential(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """P, H of ``dS = a S + b`` over unit time, by one dense matrix exponential."""
    size, width = b.shape[-2:]
    top = torch.cat((a, b), -1)
    both = torch.linalg.matrix_exp(torch.nn.functional.pad(top, (0, 0, 0, width)))
    return both[..., :size, :size], both[..., :size, size:]


def quadrature(g: Tensor, n: int) -> Tensor:
    """∫_0^1 sⁿ e^{gs} ds by Gauss-Legendre on 64 panels."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(20)
    s = torch.tensor([(p + (x + 1) / 2) / 64 for p in range(64) for x in nodes], dtype=F64)
    w = torch.tensor([y / 128 for _ in range(64) for y in weights], dtype=F64)
    return (w * s**n * torch.exp(g[..., None] * s)).sum(-1)


def rows_step(scheme: str, w: Tensor, f: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """P, H of one step of ``dS = (g + w) S + f``, g a number ``[...]``, as the scheme states it in K × K matrices."""
    identity = torch.eye(w.shape[-1], dtype=F64).expand_as(w)
    decay = 1 if g is None else g.exp()[..., None, None]
    if scheme == "euler":
        return decay * (identity + w), f
    if scheme == "backward_euler":
        inverse = torch.linalg.inv(identity - w)
        return decay * inverse, inverse @ f
    if scheme == "cayley":
        inverse = torch.linalg.inv(identity - w / 2)
        mean = 1 if g is None else torch.where(g == 0, 1.0, torch.expm1(g) / torch.where(g == 0, 1, g))[..., None, None]
        return decay * (inverse @ (identity + w / 2)), mean * (inverse @ f)
    if scheme == "rk4":
        power, transition, source = identity, identity, 0
        for n in range(4):
            weight = 1 / (n + 1) if g is None else quadrature(g, n)[..., None, None]
            source = source + weight / math.factorial(n) * (power @ f)
            power = power @ w
            transition = transition + power / math.factorial(n + 1)
        return decay * transition, source
    shift = 0 if g is None else g[..., None, None] * identity
    return affine_exponential(w + shift, f)


def dense_flows(driver: LowRankDriver, scheme: str, splitting: str | None, heads: int, width: int):
    """P, H of every token."""
    reads, writes, values = dense_rows(driver, heads)
    values = [writes[0].new_zeros(*writes[0].shape[:-1], width) if u is None else u for u in values]
    generators = [outer(b, a) for a, b in zip(reads, writes, strict=True)]
    sources = [outer(b, u) for b, u in zip(writes, values, strict=True)]
    g = driver.log_decay
    identity = torch.eye(writes[0].shape[-1], dtype=F64).expand_as(generators[0])
    vector = g is not None and g.ndim == 4
    sequential = driver.order == "sequential" and len(reads) > 1
    if not sequential:
        generators, sources = [sum(generators)], [sum(sources)]
    transition, source = identity, torch.zeros_like(sources[0])
    if scheme == "euler" and splitting is None and driver.reads == "raw" and g is not None:
        return torch.diag_embed(g.exp() if vector else g.exp()[..., None].expand(writes[0].shape)) + generators[0], (
            sources[0]
        )
    together = g if g is not None and not vector and not sequential else None
    for w, f in zip(generators, sources, strict=True):
        p, h = rows_step(scheme, w, f, together)
        transition, source = p @ transition, p @ source + h
    if g is None or together is not None:
        return transition, source
    decay = g if vector else g[..., None].expand(writes[0].shape)
    if splitting == "strang":
        half = (decay / 2).exp()
        return half[..., :, None] * transition * half[..., None, :], half[..., :, None] * source
    return transition * decay.exp()[..., None, :], source


def reference(driver: LowRankDriver, query: Tensor, state: Tensor, scheme: str, splitting: str | None, scale: float):
    """The float64 recurrence of dense transition matrices."""
    heads, width = state.shape[1], state.shape[-1]
    transition, source = dense_flows(driver, scheme, splitting, heads, width)
    query = query.repeat_interleave(heads // query.shape[2], 2)
    outputs = []
    for t in range(query.shape[1]):
        state = transition[:, t] @ state + source[:, t]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, 1), state


# --- every driver, every scheme -------------------------------------------------------------------------------------

SIZES = Sizes(batch=2, length=7, heads=1, value_heads=2, key_size=4, value_size=3)
OWN_STEP = ("longhorn", "efla")


def drivers() -> dict[str, tuple[LowRankDriver, Tensor]]:
    """One of every model's, every structure's, with a query."""
    found = {}
    build = pf.functional.drivers
    for name in (
        "linear_attention", "ssd", "gated_linear_attention", "delta_rule", "gated_delta_rule", "gated_delta_rule_2",
        "kimi_delta_attention", "comba", "delta_product", "rwkv7", "retention",
    ):  # fmt: skip
        inputs = make_inputs(name, SIZES)
        query = inputs.pop("query")
        found[name] = (getattr(build, name)(**inputs), query)
    for rank in (1, 2, 3):
        for decay in ("none", "scalar", "vector"):
            for order in ("simultaneous", "sequential"):
                inputs = make_inputs("low_rank_flow", SIZES._replace(rows=rank), decay=decay, seed=rank)
                query = inputs.pop("query")
                found[f"low_rank-{rank}-{decay}-{order}"] = (
                    build.low_rank_flow(**{"log_decay": None} | inputs, order=order),
                    query,
                )
    inputs = make_inputs("low_rank_flow", SIZES, decay="scalar")
    found["low_rank-2-scalar-raw"] = (
        build.low_rank_flow(**{n: x for n, x in inputs.items() if n != "query"}, reads="raw"),
        inputs["query"],
    )
    # single rows of all kinds beside each other: one with a value, one that writes only, one without a value
    more = make_inputs("rwkv7", SIZES, seed=5)
    rows = (
        Row(more["key"], Factor(more["key"], make_inputs("delta_rule", SIZES)["beta"], -1), Factor(more["value"])),
        Row(more["key"], value=Factor(more["value"])),
        Row(more["write"], Factor(more["read"])),
    )
    scalar = make_inputs("ssd", SIZES)["log_decay"]
    found["mixed"] = (LowRankDriver(rows), more["query"])
    found["mixed-scalar"] = (LowRankDriver(rows, scalar), more["query"])
    found["mixed-sequential"] = (LowRankDriver(rows, scalar, order="sequential"), more["query"])
    return found


DRIVERS = drivers()
CASES = [
    (name, scheme, splitting)
    for name, (driver, _) in DRIVERS.items()
    for scheme in FROZEN
    for splitting in (
        (None, "lie", "strang") if driver.log_decay is not None and driver.log_decay.ndim == 4 else (None,)
    )
]


def state_of(seed: int = 1) -> Tensor:
    return torch.randn(2, 2, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "scheme", "splitting"), CASES)
def test_every_driver_takes_every_scheme(name, scheme, splitting):
    driver, query = DRIVERS[name]
    expected = reference(driver, query, state_of(), scheme, splitting, 0.5)
    found = pf.integrate(
        driver, query, discretization=Discretization(scheme, splitting), initial_state=state_of(),
        return_final_state=True, chunk_size=4,
    )  # fmt: skip
    assert_close(found.output, expected[0], 1e-12, "output")
    assert_close(found.final_state, expected[1], 1e-12, "final state")


# --- the invariants ---------------------------------------------------------------------------------------------------


def tokens(seed: int = 0, length: int = 9, heads: int = 2, size: int = 5, width: int = 3) -> dict[str, Tensor]:
    """Keys of any length, β up to 2."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    return {
        "query": draw(2, length, 1, size),
        "key": draw(2, length, 1, size),
        "value": draw(2, length, heads, width),
        "beta": 2 * draw(2, length, heads).sigmoid(),
    }


def test_exact_rank_1_is_efla_and_backward_euler_is_longhorn():
    inputs = tokens()
    for scheme, model in (("exact", pf.efla), ("backward_euler", pf.longhorn)):
        assert_close(pf.delta_rule(**inputs, discretization=scheme).output, model(**inputs).output, 1e-14, scheme)
    strength = inputs["beta"] / (1 + inputs["beta"] * inputs["key"].square().sum(-1))
    closed = pf.delta_rule(**inputs | {"beta": strength}).output
    assert_close(pf.delta_rule(**inputs, discretization="backward_euler").output, closed, 1e-14, "β/(1+β‖k‖²)")


def test_exact_rank_1_is_the_product_of_exponentials():
    """``I + ((e^{tr ω} - 1) / tr ω) ω`` with ``ω = b aᵀ``, of any trace."""
    inputs = make_inputs("low_rank_flow", SIZES._replace(rows=1, heads=2), decay="none")
    inputs["read"] = 3 * torch.randn_like(inputs["read"])
    query, state, expected = inputs.pop("query"), state_of(), []
    for t in range(query.shape[1]):
        a, b, u = inputs["read"][:, t, 0], inputs["write"][:, t, 0], inputs["value"][:, t, 0]
        trace = (a * b).sum(-1)[..., None, None]
        factor = torch.expm1(trace) / trace
        state = (torch.eye(4, dtype=F64) + factor * outer(b, a)) @ state + factor * outer(b, u)
        expected.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    found = pf.low_rank_flow(query, **inputs, discretization="exact", initial_state=state_of(), scale=1.0).output
    assert_close(found, torch.stack(expected, 1), 1e-13)


@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule", "rwkv7", "low_rank-3-scalar-simultaneous", "comba"])
def test_exact_steps_compose(name):
    """A token of step 1 is two of 0.3 and 0.7 (a split decay would not compose: RWKV-7 runs without its own)."""
    driver, query = DRIVERS[name]
    if name == "rwkv7":
        driver = LowRankDriver(driver.rows)
    twice = lambda x: None if x is None else x.repeat_interleave(2, 1)  # noqa: E731
    factor = lambda f: None if f is None else Factor(twice(f.vector), twice(f.coefficient), f.sign)  # noqa: E731
    rows = tuple(Row(twice(row.write), factor(row.read), factor(row.value)) for row in driver.rows)
    parts = torch.tensor([0.3, 0.7], dtype=F64).repeat(query.shape[1]).expand(2, -1)
    split = LowRankDriver(rows, twice(driver.log_decay), driver.order, driver.reads)
    fine = pf.integrate(split, twice(query), discretization=Discretization("exact", step=parts), initial_state=state_of())
    whole = pf.integrate(driver, query, discretization="exact", initial_state=state_of())
    assert_close(whole.output, fine.output[:, 1::2], 1e-13)
    other = pf.integrate(split, twice(query), discretization=Discretization("rk4", step=parts), initial_state=state_of())
    assert (whole.output - other.output[:, 1::2]).abs().max() > 1e-8  # the test can tell


def skew(length: int, pairs: int = 2, size: int = 6) -> dict[str, Tensor]:
    """Rows with ``B Aᵀ = Σ y xᵀ - x yᵀ``, large ones."""
    generator = torch.Generator().manual_seed(4)
    x, y = (2 * torch.randn(1, length, pairs, 1, size, generator=generator, dtype=F64) for _ in range(2))
    return {"read": torch.cat((x, -y), 2), "write": torch.cat((y, x), 2)}


@pytest.mark.parametrize(("scheme", "preserves"), [("cayley", True), ("exact", True), ("euler", False), ("rk4", False)])
def test_skew_rows_preserve_the_norm(scheme, preserves):
    rows, state = skew(40), torch.randn(1, 1, 6, 3, dtype=F64)
    value = torch.zeros(1, 40, 4, 1, 3, dtype=F64)
    query = torch.zeros(1, 40, 1, 6, dtype=F64)
    final = pf.low_rank_flow(
        query, value, **rows, discretization=scheme, initial_state=state, return_final_state=True
    ).final_state
    columns = (final.norm(dim=-2) / state.norm(dim=-2) - 1).abs().max()
    assert (columns <= 1e-12) == preserves, columns


def test_two_skew_rows_rotate_exactly():
    """a = (x, -y), b = (y, x) with orthonormal x, y scaled by √θ: a rotation by θ in their plane."""
    angle = torch.tensor(0.7, dtype=F64)
    x, y = angle.sqrt() * torch.eye(2, dtype=F64)
    read, write = torch.stack((x, -y))[None, None, :, None], torch.stack((y, x))[None, None, :, None]
    value = torch.zeros(1, 1, 2, 1, 2, dtype=F64)
    final = pf.low_rank_flow(
        x[None, None, None], value, read=read, write=write, discretization="exact", return_final_state=True,
        initial_state=torch.eye(2, dtype=F64)[None, None],
    ).final_state[0, 0]  # fmt: skip
    rotation = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=F64)
    assert_close(final, rotation, 1e-15)


def test_euler_is_the_model():
    for driver, query in DRIVERS.values():
        plain = pf.integrate(driver, query, initial_state=state_of()).output
        assert torch.equal(plain, pf.integrate(driver, query, discretization="euler", initial_state=state_of()).output)


@pytest.mark.parametrize("scheme", FROZEN)
def test_the_state_of_a_constant_input_is_reached(scheme):
    """Rows that only write, under a strong decay: u / -g is the exact rest point of every scheme but Euler's."""
    log_decay = torch.full((1, 30, 1), -3.0, dtype=F64)
    key, value = torch.ones(1, 30, 1, 1, dtype=F64), torch.full((1, 30, 1, 1), 2.0, dtype=F64)
    state = pf.ssd(key, key, value, log_decay, discretization=scheme, return_final_state=True).final_state.item()
    rest = {"euler": 2 / (1 - math.exp(-3)), "backward_euler": None}.get(scheme, 2 / 3)
    if rest is None:  # decay, then the implicit rows: like Euler's where nothing reads
        rest = 2 / (1 - math.exp(-3))
    assert abs(state - rest) < 1e-12
