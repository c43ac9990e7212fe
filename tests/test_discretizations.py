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
from parallelflow.discretizations.phi import _augmented, moments, phi1, phi1_matrix
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
    fine = pf.integrate(
        split, twice(query), discretization=Discretization("exact", step=parts), initial_state=state_of()
    )
    whole = pf.integrate(driver, query, discretization="exact", initial_state=state_of())
    assert_close(whole.output, fine.output[:, 1::2], 1e-13)
    other = pf.integrate(
        split, twice(query), discretization=Discretization("rk4", step=parts), initial_state=state_of()
    )
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


# --- Φ: accuracy and derivatives --------------------------------------------------------------------------------------


def test_phi1_of_numbers():
    """To a few roundings from -1e5 to 60, both dtypes; its first three derivatives as well."""
    from mpmath import diff, mp, mpf
    from mpmath import expm1 as exact_expm1

    with mp.workdps(60):
        exact = lambda x: exact_expm1(x) / x if x else mpf(1)  # noqa: E731
        points = [-1e5, -100.0, -3.0, -1.0001, -1.0, -0.5, -1e-3, -1e-6, -1e-20, 0.0, 1e-9, 0.3, 1.0, 1.5, 60.0]
        for dtype, rounding in ((F64, 1e-15), (torch.float32, 5e-7)):
            x = torch.tensor(points, dtype=dtype, requires_grad=True)
            value = phi1(x)
            for n in range(4):
                for place, point in enumerate(x.tolist()):
                    at = mpf(point)
                    if n:
                        wanted = diff(exact, at, n) if abs(point) > 1e-3 else mpf(1) / (n + 1) + at / (n + 2)
                    else:
                        wanted = exact(at)
                    if n and abs(point) <= 1e-3 and abs(point) > 1e-9:
                        wanted = sum(at**m / (mp.factorial(m) * (m + n + 1)) for m in range(20))
                    assert abs(value[place].item() - wanted) <= 40 * rounding * abs(wanted), (n, point, dtype)
                (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)


@pytest.mark.parametrize("norm", [0.0, 1e-8, 1e-3, 1.0, 30.0, 1e4])
def test_phi1_of_matrices(norm):
    """Against mpmath with 50 digits: decaying, rotating, and defective matrices."""
    from mpmath import expm, matrix, mp, mpf

    generator = torch.Generator().manual_seed(7)
    q = torch.randn(3, 3, generator=generator, dtype=F64)
    q = q / torch.linalg.matrix_norm(q, 2)
    for kind, x in {"decay": -q @ q.T, "rotation": q - q.T, "nilpotent": q.triu(1)}.items():
        x = norm * x
        with mp.workdps(50):
            both = matrix(6)
            for i in range(3):
                both[i, 3 + i] = mpf(1)
                for j in range(3):
                    both[i, j] = mpf(x[i, j].item())
            exponential = expm(both)
            wanted = torch.tensor([[float(exponential[i, 3 + j]) for j in range(3)] for i in range(3)], dtype=F64)
        error = (phi1_matrix(x) - wanted).norm() / wanted.norm()
        assert error <= 1e-15 * (10 + (norm if kind == "rotation" else 0)), (kind, error)
        other = (_augmented(x) - wanted).norm() / wanted.norm()
        assert other <= 1e-15 * (10 + 10 * norm), (kind, other)
        narrow = (phi1_matrix(x.float()).double() - wanted).norm() / wanted.norm()
        assert narrow <= 1e-7 * (2 + 2 * norm), (kind, narrow)


def test_phi1_of_matrices_is_differentiable_everywhere():
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(4, 2, 3, 3, generator=generator, dtype=F64)
    x[0], x[1] = 0, 1e-9 * x[1]
    x[2] = -20 * x[2] @ x[2].mT
    x.requires_grad_()
    assert torch.autograd.gradcheck(phi1_matrix, x)
    assert torch.autograd.gradgradcheck(phi1_matrix, x.detach()[:3].requires_grad_())
    line = torch.linspace(-3, 3, 13, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(phi1, line)
    assert torch.autograd.gradgradcheck(phi1, line)


def test_moments():
    g = torch.tensor([-100.0, -3.0, -1.0001, -1.0, -0.999, -0.1, -1e-6, 0.0], dtype=F64, requires_grad=True)
    for n, moment in enumerate(moments(g, 4)):
        assert_close(moment, quadrature(g.detach(), n), 1e-14, f"J_{n}")
        assert ((moment - quadrature(g.detach(), n)) / moment).abs().max() < 1e-11
    assert torch.autograd.gradcheck(lambda g: tuple(moments(g, 4)), g)


# --- ties, dtypes, hostile inputs -------------------------------------------------------------------------------------


def test_ties_hold():
    """One row without a decay, and the implicit step with one: the key and the coefficient are still shared."""
    from parallelflow.drivers import delta_product, delta_rule, gated_delta_rule
    from parallelflow.problem import canonical

    plain = make_inputs("gated_delta_rule", SIZES)
    rows = make_inputs("delta_product", SIZES)
    cases = [(delta_rule(plain["key"], plain["value"], plain["beta"]), scheme) for scheme in FROZEN]
    cases += [(delta_product(rows["key"], rows["value"], rows["beta"]), scheme) for scheme in FROZEN]
    cases += [
        (gated_delta_rule(plain["key"], plain["value"], plain["beta"], plain["log_decay"]), scheme)
        for scheme in ("euler", "backward_euler")
    ]
    for driver, scheme in cases:
        for step in (None, 0.5, torch.rand(2, 7, dtype=F64), torch.rand(2, 7, 2, dtype=F64)):
            stepped = pf.discretize(driver, Discretization(scheme, step=step))
            (row,) = stepped.rows
            assert row.read.vector is row.write is driver.rows[0].write, scheme
            assert row.value.vector is driver.rows[0].value.vector
            assert row.read.coefficient is row.value.coefficient
            assert canonical(stepped, plain["query"], None, None)[1].tied


@pytest.mark.parametrize("scheme", FROZEN)
@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule", "kimi_delta_attention", "rwkv7", "delta_product"])
def test_narrow_inputs(name, scheme):
    """float32 and bfloat16 stay within what the rounding of inputs, rows and output makes."""
    inputs = make_inputs(name, SIZES._replace(length=40, key_size=16, value_size=16))
    call = getattr(pf, name)
    for dtype, budget in ((torch.float32, 4e-6), (torch.bfloat16, 2e-2)):
        narrow = {n: x.to(dtype) for n, x in inputs.items()}
        exact = call(**{n: x.double() for n, x in narrow.items()}, discretization=scheme).output
        output = call(**narrow, discretization=scheme).output
        assert output.dtype == dtype
        assert ((output.double() - exact).norm() / exact.norm()) <= budget


@pytest.mark.parametrize("scheme", FROZEN)
@pytest.mark.parametrize("splitting", [None, "strang"])
def test_decays_of_any_strength(scheme, splitting):
    """From -1e-6 to -100 and resets: finite, with finite gradients; a reset token writes as if on an empty state."""
    vector = splitting is not None
    name = "kimi_delta_attention" if vector else "gated_delta_rule"
    inputs = make_inputs(name, SIZES._replace(length=24))
    generator = torch.Generator().manual_seed(1)
    pick = torch.randint(0, 4, inputs["log_decay"].shape, generator=generator)
    inputs["log_decay"] = torch.tensor([-1e-6, -1.0, -100.0, -torch.inf], dtype=F64)[pick]
    inputs["log_decay"][:, 12] = -torch.inf
    leaves = require_grad(inputs)
    chosen = Discretization(scheme, splitting)
    output = getattr(pf, name)(**leaves, discretization=chosen).output
    assert output.isfinite().all()
    for what, gradient in gradients([output], leaves).items():
        assert gradient.isfinite().all(), what
    fresh = {n: x[:, 12:].clone() for n, x in inputs.items()}
    fresh["log_decay"][:, 0] = 0
    assert_close(getattr(pf, name)(**fresh, discretization=chosen).output, output[:, 12:], 1e-12)


@pytest.mark.parametrize("scheme", FROZEN)
def test_a_reset_is_no_rate(scheme):
    """It resets however short the step is, 0 included, and its gradients are finite."""
    inputs = make_inputs("gated_delta_rule", SIZES)
    inputs["log_decay"][:, 3] = -torch.inf
    step = torch.rand(2, 7, dtype=F64)
    step[:, 3] = 0
    leaves = require_grad(inputs | {"step": step})
    chosen = Discretization(scheme, step=leaves["step"])
    output = pf.gated_delta_rule(**{n: x for n, x in leaves.items() if n != "step"}, discretization=chosen).output
    assert not output[:, 3].any()  # emptied, and nothing written in no time
    for what, gradient in gradients([output], leaves).items():
        assert gradient.isfinite().all(), what


def test_zero_keys_have_gradients():
    """X = 0, where φ1's quotient is 0 / 0."""
    for scheme in FROZEN:
        inputs = tokens()
        inputs["key"] = torch.zeros_like(inputs["key"])
        leaves = require_grad(inputs)
        for gradient in gradients([pf.delta_rule(**leaves, discretization=scheme).output], leaves).values():
            assert gradient.isfinite().all()
        assert gradients([pf.delta_rule(**leaves, discretization=scheme).output], leaves)["key"].any()


# --- it runs everywhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gated_delta_rule", "rwkv7", "low_rank-3-scalar-simultaneous", "low_rank-3-vector-sequential"]
)
def test_every_solver_and_aggregate(name):
    driver, query = DRIVERS[name]
    splitting = "strang" if driver.log_decay.ndim == 4 else None
    chosen = Discretization("exact", splitting)
    expected = reference(driver, query, state_of(), "exact", splitting, 0.5)[0]
    for solver in SOLVERS:
        for aggregate in AGGREGATES:
            options = {"solver": solver, "aggregate": aggregate, "chunk_size": 3}
            found = pf.integrate(driver, query, discretization=chosen, initial_state=state_of(), **options).output
            assert_close(found, expected, 1e-12, f"{solver}, {aggregate}")


@pytest.mark.parametrize("scheme", FROZEN)
@pytest.mark.parametrize(
    "name", ["gated_delta_rule", "rwkv7", "delta_product", "kimi_delta_attention", "low_rank_flow"]
)
def test_gradients(name, scheme):
    inputs = make_inputs(name, Sizes(1, 3, 1, 2, 2, 1, 2), seed=3)
    decays = inputs["log_decay"].ndim == 4
    chosen = Discretization(scheme, "strang" if decays else None, step=0.7)
    leaves = list(require_grad(inputs).values())

    def run(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return getattr(pf, name)(**named, discretization=chosen, return_final_state=True)[:2]

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_gradients_with_respect_to_the_step():
    driver, query = DRIVERS["gated_delta_rule"]
    step = torch.rand(2, 7, dtype=F64).requires_grad_()
    for scheme in FROZEN:
        run = lambda h, scheme=scheme: pf.integrate(driver, query, discretization=Discretization(scheme, step=h)).output  # noqa: E731
        assert torch.autograd.gradcheck(run, step, fast_mode=True)


def test_packed_sequences_states_and_single_steps():
    inputs = tokens(length=8)
    inputs = {n: x[:1] for n, x in inputs.items()}
    bounds = torch.tensor([0, 3, 8])
    whole = pf.delta_rule(**inputs, discretization="cayley", cu_seqlens=bounds, return_final_state=True)
    parts = [
        pf.delta_rule(**{n: x[:, a:b] for n, x in inputs.items()}, discretization="cayley", return_final_state=True)
        for a, b in ((0, 3), (3, 8))
    ]
    assert_close(whole.output, torch.cat([p.output for p in parts], 1), 1e-14)
    single = pf.delta_rule(**inputs, discretization="cayley", state_positions=[3, 5], return_final_state=True)
    state = torch.zeros(1, 2, 5, 3, dtype=F64)
    outputs = []
    for t in range(8):
        token = {n: x[:, t] for n, x in inputs.items()}
        chosen = Discretization("cayley", step=torch.ones(1, 1, dtype=F64))
        output, state = pf.step.delta_rule(**token, state=state, discretization=chosen)
        outputs.append(output)
        if t + 1 in (3, 5):
            assert_close(single.states[:, (3, 5).index(t + 1)], state, 1e-14)
    assert_close(single.output, torch.stack(outputs, 1), 1e-14)


def test_under_function_transforms_and_the_compiler():
    inputs = make_inputs("rwkv7", SIZES)
    run = lambda x: pf.rwkv7(**x, discretization=Discretization("exact", "strang")).output  # noqa: E731
    expected = run(inputs)
    assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(inputs), expected, 1e-13)
    each = {n: x[:, None] for n, x in inputs.items()}
    assert_close(torch.func.vmap(run)(each)[:, 0], expected, 1e-13)


def test_autocast_leaves_the_small_matrices_alone():
    inputs = {n: x.float() for n, x in make_inputs("rwkv7", SIZES).items()}
    driver = pf.functional.drivers.rwkv7(**{n: x for n, x in inputs.items() if n != "query"})
    expected = pf.discretize(driver, "exact").rows[0].read.vector
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pf.discretize(driver, "exact").rows[0].read.vector, expected)


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        (lambda: "magnus4", ValueError, "discretization: got 'magnus4' with a driver.*DriverSource"),
        (lambda: "exakt", ValueError, "discretization: got 'exakt'.*did you mean 'exact'"),
        (lambda: 4, TypeError, "discretization: got int, expected a Discretization"),
        (lambda: Discretization("exact", "strang"), ValueError, "splitting: got 'strang' with no decay or one a head"),
        (lambda: Discretization("exact", "halves"), ValueError, "splitting: got 'halves'"),
        (lambda: Discretization("exact", node="left"), ValueError, "node: got 'left' with a driver"),
        (lambda: Discretization("exact", step="1"), TypeError, "step: got '1', expected a number"),
        (lambda: Discretization("exact", step=-1), ValueError, "step: got -1, expected a finite length of time"),
        (lambda: Discretization("exact", step=math.nan), ValueError, "step: got nan, expected a finite length"),
        (
            lambda: Discretization("exact", step=-torch.ones(2, 9)),
            ValueError,
            "step: got some that are negative or NaN",
        ),
        (lambda: Discretization("exact", step=torch.ones(2)), ValueError, r"step: got shape \[2\]"),
        (lambda: Discretization("exact", step=torch.ones(2, 8)), ValueError, r"step: got shape \[2, 8\]"),
        (lambda: Discretization("exact", step=torch.ones(2, 9, 3)), ValueError, r"step: got shape \[2, 9, 3\]"),
        (lambda: Discretization("exact", step=torch.ones(2, 9).int()), TypeError, "step: got dtype torch.int32"),
        (lambda: Discretization("magnus4", splitting="lie"), ValueError, "splitting: got 'lie' with 'magnus4'"),
    ],
)
def test_errors(chosen, error, message):
    with pytest.raises(error, match=message):
        pf.delta_rule(**tokens(), discretization=chosen())


@pytest.mark.parametrize("model", [pf.longhorn, pf.efla])
def test_models_that_are_a_discretisation_take_no_other(model):
    with pytest.raises(ValueError, match="discretization: got 'rk4', expected none"):
        model(**tokens(), discretization="rk4")


def test_shapes_are_checked_first():
    driver, query = DRIVERS["rwkv7"]
    wrong = LowRankDriver(driver.rows, driver.log_decay[:, :5], reads="raw")
    with pytest.raises(ValueError, match=r"log_decay: got shape \[2, 5, 2, 4\]"):
        pf.integrate(wrong, query, discretization="exact")


def test_a_kernel_that_cannot_says_so():
    """Kernels serve up to 16 rows a token; a forced one says what it lacks."""
    sizes = SIZES._replace(rows=17)
    inputs = {n: x.float().requires_grad_() for n, x in make_inputs("low_rank_flow", sizes, decay="none").items()}
    with pytest.raises(ValueError, match="backend: got 'cpu' with 17 rows a token, expected at most 16"):
        pf.low_rank_flow(**inputs, discretization="exact", backend="cpu")
