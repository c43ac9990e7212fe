"""Continuous inputs: interpolation, controlled equations, log-signatures, and steps that hold a tolerance.

References are dense matrix exponentials on fine grids, numpy's interpolation, and sums over fine polygons.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import parallelflow as pf
from parallelflow import Discretization, DriverSource, paths
from parallelflow.paths import adaptive
from parallelflow.paths.adaptive import _flows, _states
from tests.cases import assert_close

F64 = torch.float64
NAN = float("nan")


def observations(batch: int = 2, length: int = 9, channels: int = 2, dropped: float = 0.3, seed: int = 0):
    """Irregular times in [0, 1] and values with gaps; the first and the last observation are there."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand(batch, length, generator=generator, dtype=F64).sort(1).values
    times[:, 0], times[:, -1] = 0, 1
    values = torch.randn(batch, length, channels, generator=generator, dtype=F64)
    gone = torch.rand(values.shape, generator=generator) < dropped
    gone[:, 0] = gone[:, -1] = False
    return times, values.masked_fill(gone, NAN)


# --- interpolation ----------------------------------------------------------------------------------------------------


def test_linear_is_numpys():
    times, values = observations()
    path = paths.linear(times, values)
    at = torch.linspace(0, 1, 57, dtype=F64)
    found = path.evaluate(at)
    assert_close(found[..., 0], at.expand(2, -1), 1e-14, "time")
    for b in range(2):
        for d in range(2):
            there = ~values[b, :, d].isnan()
            expected = np.interp(at, times[b, there], values[b, there, d])
            assert_close(found[b, :, 1 + d], torch.from_numpy(expected), 1e-13)


def test_the_derivative_at_a_knot_is_that_of_the_later_piece():
    times, values = observations(dropped=0.0)
    slopes = values.diff(dim=1) / times.diff(dim=1)[..., None]
    assert_close(paths.linear(times, values).derivative(times[:, :-1])[..., 1:], slopes, 1e-12)


def test_ends_that_are_missing():
    times = torch.linspace(0, 1, 5, dtype=F64)
    values = torch.tensor([[[NAN, NAN], [1.0, NAN], [NAN, NAN], [3.0, NAN], [NAN, NAN]]], dtype=F64)
    straight = paths.linear(times, values).evaluate(times)[0, :, 1:]
    assert straight[:, 0].tolist() == [1, 1, 2, 3, 3]
    assert straight[:, 1].tolist() == [0] * 5
    held = paths.rectilinear(times, values).evaluate(2 * torch.arange(5, dtype=F64))[0, :, 1:]
    assert held[:, 0].tolist() == [0, 1, 1, 3, 3]


def test_hermite():
    """Through the observations, with a continuous derivative that is the slope behind; blind to what comes later."""
    times, values = observations(dropped=0.0)
    path = paths.hermite(times, values)
    assert_close(path.evaluate(times)[..., 1:], values, 1e-12)
    slopes = values.diff(dim=1) / times.diff(dim=1)[..., None]
    for b in range(2):
        for n in range(1, 8):
            knot = times[b, n]
            left = path.derivative((knot - 1e-9).expand(2, 1))[b, 0, 1:]
            right = path.derivative(knot.expand(2, 1))[b, 0, 1:]
            assert_close(left, slopes[b, n - 1], 1e-6)
            assert_close(right, slopes[b, n - 1], 1e-10)
    later = values.clone()
    later[:, 5:] += 1
    at = torch.linspace(0, 1, 101, dtype=F64)
    seen = paths.hermite(times, later).evaluate(at) != path.evaluate(at)
    for b in range(2):
        assert not seen[b, at < times[b, 4]].any()
        assert seen[b, at > times[b, 4] + 0.05].any()


def test_rectilinear_is_causal():
    times, values = observations()
    path = paths.rectilinear(times, values)
    later = values.clone()
    later[:, 5:] = 7.0
    other = paths.rectilinear(times, later)
    at = torch.linspace(0, 16, 161, dtype=F64)
    same = (path.evaluate(at) == other.evaluate(at)).all(-1).all(0)
    assert same[at <= 9].all()  # observation 5 is at parameter 10, the jump to it begins at 9
    assert not same[at > 9.05].any()
    assert_close(path.evaluate(2 * torch.arange(9, dtype=F64))[..., 0], times, 1e-14)
    halves = path.evaluate(2 * torch.arange(8, dtype=F64) + 1)
    assert_close(halves[..., 0], times[:, 1:], 1e-14, "time first")
    assert_close(halves[..., 1:], path.evaluate(2 * torch.arange(8, dtype=F64))[..., 1:], 1e-14, "values then")


@pytest.mark.parametrize("make", [paths.linear, paths.hermite])
def test_padding_changes_nothing(make):
    times, values = observations()
    more = torch.cat((times, times[:, -1:].expand(-1, 3)), 1)
    padded = make(more, torch.cat((values, torch.full((2, 3, 2), NAN, dtype=F64)), 1))
    field = random_field(3)
    query = torch.randn(2, 11, 1, 4, dtype=F64)
    whole = pf.integrate(paths.controlled(padded, field), query, discretization="exact", return_final_state=True)
    path = make(times, values)
    alone = pf.integrate(paths.controlled(path, field), query[:, :8], discretization="exact", return_final_state=True)
    assert_close(whole.final_state, alone.final_state, 1e-14)
    assert_close(whole.output[:, :8], alone.output, 1e-14)


@pytest.mark.parametrize("make", [paths.linear, paths.hermite, paths.rectilinear])
def test_gradients_of_paths(make):
    times, values = observations(batch=1, length=5, seed=3)
    there = ~values.isnan()
    end = make(times, values).knots[0, -1].item()

    def run(times: Tensor, known: Tensor) -> Tensor:
        filled = torch.full_like(values, NAN).masked_scatter(there, known)
        path = make(times, filled)
        grid = torch.linspace(0.05, 0.9, 4, dtype=F64) * end
        return torch.cat((path.evaluate(grid), path.derivative(grid)), -1)

    assert torch.autograd.gradcheck(run, (times.requires_grad_(), values[there].requires_grad_()))


@pytest.mark.parametrize(
    ("times", "values", "message"),
    [
        (torch.tensor([0.0, 2.0, 1.0]), torch.zeros(1, 3, 1), "times: got some that decrease"),
        (torch.tensor([0.0, NAN, 1.0]), torch.zeros(1, 3, 1), "times: got some that decrease or are NaN"),
        (torch.tensor([0.0, 1.0, 1.0]), torch.arange(3.0)[None, :, None], "times: got two equal ones"),
        (torch.tensor([0.0, 1.0]), torch.zeros(1, 3, 1), r"times: got shape \[2\]"),
        (torch.tensor([0.0]), torch.zeros(1, 1, 1), "expected at least two observations"),
        (torch.tensor([0.0, 1.0]), torch.zeros(2, 1), r"values: got shape \[2, 1\]"),
        (torch.tensor([0.0, torch.inf]), torch.zeros(1, 2, 1), "times: got infinite"),
        (torch.tensor([0.0, 1.0]), torch.tensor([[[0.0], [torch.inf]]]), "values: got infinite"),
    ],
)
def test_errors_of_paths(times, values, message):
    with pytest.raises(ValueError, match=message):
        paths.linear(times, values)


def test_errors_of_what_is_made_of_paths():
    """A path, a field, a source and a grid in each other's places, and a grid that goes back."""
    times, values = observations()
    path, field = paths.linear(times, values), random_field(3)
    source, query = paths.controlled(path, field), torch.zeros(2, 8, 1, 4, dtype=F64)
    back, one = times.flip(1), times[:, :1]
    cases = [
        (lambda: path.evaluate(times.repeat(2, 1)), ValueError, r"times: got shape \[4, 9\].* B = 2"),
        (lambda: paths.controlled(field, path), TypeError, "path: got LinearField, expected a Path"),
        (lambda: paths.controlled(path, path), TypeError, "field: got Path, expected a LinearField"),
        (lambda: paths.controlled(path, field, back), ValueError, "grid: got times that decrease"),
        (lambda: paths.log_ode(path, field, back), ValueError, "grid: got times that decrease"),
        (lambda: paths.log_signature(path, one), ValueError, r"grid: got shape \[2, 1\], expected at least two"),
        (lambda: paths.log_signature(values, times), TypeError, "path: got Tensor, expected a Path"),
        (lambda: paths.solve(pf.discretize(source, "exact"), query), TypeError, "source: got LowRankDriver"),
        (lambda: paths.refine(path), TypeError, "source: got Path, expected a DriverSource"),
        (lambda: paths.solve(source, query.tolist()), TypeError, "query: got list"),
        (lambda: paths.solve(source, query, max_steps=15), ValueError, "max_steps: got 15, expected at least 16"),
        (
            lambda: paths.solve(source, query, initial_state=torch.zeros(2, 1, 3, 4)),
            ValueError,
            r"initial_state: got shape \[2, 1, 3, 4\], expected \[B, HV, K, V\]",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


# --- controlled equations ---------------------------------------------------------------------------------------------


def random_field(channels: int, decay: str = "none", rank: int = 2, seed: int = 1) -> paths.LinearField:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64) / 2  # noqa: E731
    read, write, value = draw(channels, rank, 1, 4), draw(channels, rank, 1, 4), draw(channels, rank, 2, 3)
    log_decay = None
    if decay != "none":
        log_decay = torch.zeros(channels, 2, *((4,) if decay == "vector" else ()), dtype=F64)
        log_decay[0] = -0.2 - draw(*log_decay.shape[1:]).square()
    return paths.LinearField(read, write, value, log_decay)


def augmented(field: paths.LinearField, head: int) -> Tensor:
    """``[[diag g_i + B_i A_iᵀ, B_i U_iᵀ], [0, 0]]`` of every channel, ``[D, K + V, K + V]``."""
    read, write, value = field.read[:, :, 0], field.write[:, :, 0], field.value[:, :, head]
    matrix = write.mT @ read
    if field.log_decay is not None:
        decay = field.log_decay[:, head]
        matrix = matrix + torch.diag_embed(decay if decay.ndim == 2 else decay[:, None].expand(-1, 4))
    return torch.nn.functional.pad(torch.cat((matrix, write.mT @ value), -1), (0, 0, 0, 3))


def reference(path: paths.Path, field: paths.LinearField, grid: Tensor, pieces: int = 1) -> Tensor:
    """The states ``[B, T, HV, K, V]`` from zero: products of dense exponentials on every step cut into pieces."""
    batch = path.knots.shape[0]
    grid = grid.expand(batch, -1)
    share = torch.arange(pieces, dtype=F64) / pieces
    fine = torch.cat((grid[:, :-1, None].lerp(grid[:, 1:, None], share).flatten(1), grid[:, -1:]), 1)
    increments = path.evaluate(fine).diff(dim=1)
    states = []
    for head in range(2):
        steps = torch.linalg.matrix_exp(torch.einsum("btd,dij->btij", increments, augmented(field, head)))
        flow = torch.eye(7, dtype=F64).expand(batch, 7, 7)
        found = []
        for t in range(steps.shape[1]):
            flow = steps[:, t] @ flow
            if (t + 1) % pieces == 0:
                found.append(flow[:, :4, 4:])
        states.append(torch.stack(found, 1))
    return torch.stack(states, 2)


def read_out(states: Tensor, query: Tensor) -> Tensor:
    return torch.einsum("bthkv,btgk->bthv", states, query) / 2


@pytest.mark.parametrize("decay", ["none", "scalar"])
@pytest.mark.parametrize("make", [paths.linear, paths.rectilinear])
def test_exact_is_exact_on_straight_pieces(make, decay):
    times, values = observations()
    path, field = make(times, values), random_field(3, decay)
    query = torch.randn(2, path.knots.shape[1] - 1, 1, 4, dtype=F64)
    expected = read_out(reference(path, field, path.knots), query)
    for scheme in ("exact", "magnus4"):
        found = pf.integrate(paths.controlled(path, field), query, discretization=scheme).output
        assert_close(found, expected, 1e-12, scheme)


def slope(counts: list[int], errors: list[float]) -> float:
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize(
    ("decay", "chosen", "order"),
    [
        ("none", "cayley", 2),
        ("scalar", "exact", 2),
        ("scalar", "magnus4", 4),
        ("vector", Discretization("exact", "lie"), 1),
        ("vector", Discretization("exact", "strang"), 2),
    ],
)
def test_orders_along_a_smooth_path(decay, chosen, order):
    times, values = observations(length=4)
    path, field = paths.hermite(times, values), random_field(3, decay)
    expected = reference(path, field, path.knots, 4000)[:, -1]
    counts, errors = [8, 12, 16, 24] if order > 1 else [60, 80, 100, 120], []
    for count in counts:
        share = torch.arange(count, dtype=F64) / count
        grid = torch.cat(
            (path.knots[:, :-1, None].lerp(path.knots[:, 1:, None], share).flatten(1), path.knots[:, -1:]), 1
        )
        query = torch.zeros(2, 3 * count, 1, 4, dtype=F64)
        source = paths.controlled(path, field, grid)
        final = pf.integrate(source, query, discretization=chosen, return_final_state=True).final_state
        errors.append((final - expected).norm().item())
    assert abs(slope(counts, errors) - order) <= 0.15, errors


def test_gradients_through_everything():
    times, values = observations(batch=1, length=4, channels=1, dropped=0.0)
    field = random_field(2, "scalar", rank=1)
    tensors = [values, field.read, field.write, field.value, field.log_decay]
    query = torch.randn(1, 3, 1, 4, dtype=F64)

    def run(values: Tensor, *parts: Tensor) -> Tensor:
        path = paths.hermite(times, values)
        source = paths.controlled(path, paths.LinearField(*parts))
        windows = paths.log_ode(path, paths.LinearField(*parts), path.knots[:, ::3])
        return torch.cat(
            (
                pf.integrate(source, query, discretization="magnus4").output,
                pf.integrate(windows, query[:, :1]).output,
            ),
            1,
        )

    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    leaves[4].data[1] = 0
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_errors_of_fields():
    field, path = random_field(3), paths.linear(*observations())
    with pytest.raises(ValueError, match=r"write: got shape \[2, 2, 1, 4\]"):
        paths.LinearField(field.read, field.write[:2], field.value)
    with pytest.raises(ValueError, match="path: got 3 channels with time, expected the field's 4"):
        pf.discretize(paths.controlled(path, random_field(4)), "exact")
    with pytest.raises(ValueError, match="discretization: got 'log_ode' with a log-decay a key channel"):
        paths.log_ode(path, random_field(3, "vector"), path.knots)
    rising = paths.LinearField(field.read, field.write, field.value, torch.ones(3, 2, dtype=F64))
    with pytest.raises(ValueError, match="log_decay: got positive"):
        pf.integrate(paths.controlled(path, rising), torch.zeros(2, 8, 1, 4, dtype=F64), discretization="exact")


# --- log-signatures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [paths.linear, paths.hermite, paths.rectilinear])
def test_log_signature_is_that_of_a_fine_polygon(make):
    path = make(*observations())
    end = path.knots[0, -1]
    grid = torch.tensor([0.0, 0.13, 0.55, 0.55, 1.0], dtype=F64) * end
    increment, area = paths.log_signature(path, grid)
    for w in range(4):
        knots = path.knots[(path.knots > grid[w]) & (path.knots < grid[w + 1])]
        fine = torch.cat((torch.linspace(grid[w], grid[w + 1], 4001, dtype=F64), knots)).sort().values
        x = path.evaluate(fine)
        x = x - x[:, :1]
        middle, step = (x[:, 1:] + x[:, :-1]) / 2, x.diff(dim=1)
        iterated = torch.einsum("bti,btj->bij", middle, step)
        assert_close(increment[:, w], x[:, -1], 1e-13)
        assert_close(area[:, w], (iterated - iterated.mT) / 2, 1e-6, f"window {w}")


def test_log_ode_on_one_straight_piece_is_exact():
    path, field = paths.linear(*observations()), random_field(3, "scalar")
    query = torch.randn(2, 8, 1, 4, dtype=F64)
    found = pf.integrate(paths.log_ode(path, field, path.knots), query).output
    assert_close(found, read_out(reference(path, field, path.knots), query), 1e-12)


@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_order_of_the_log_ode(decay):
    """4 on a smooth path; and on windows of many straight pieces far better than their increments alone."""
    times, values = observations(length=4)
    path, field = paths.hermite(times, values), random_field(3, decay)
    expected = reference(path, field, path.knots, 4000)[:, -1]
    counts, errors = [4, 6, 8, 12], []
    for count in counts:
        share = torch.arange(count, dtype=F64) / count
        grid = torch.cat(
            (path.knots[:, :-1, None].lerp(path.knots[:, 1:, None], share).flatten(1), path.knots[:, -1:]), 1
        )
        query = torch.zeros(2, 3 * count, 1, 4, dtype=F64)
        final = pf.integrate(paths.log_ode(path, field, grid), query, return_final_state=True).final_state
        errors.append((final - expected).norm().item())
    assert abs(slope(counts, errors) - 4) <= 0.15, errors

    rough = paths.linear(torch.linspace(0, 1, 65, dtype=F64), torch.randn(2, 65, 2, dtype=F64).cumsum(1) / 40)
    expected = reference(rough, field, rough.knots)[:, -1]
    windows, query = rough.knots[:, ::8], torch.zeros(2, 8, 1, 4, dtype=F64)
    second = pf.integrate(paths.log_ode(rough, field, windows), query, return_final_state=True).final_state
    straight = paths.Path(
        windows, torch.stack((rough.evaluate(windows)[:, :-1], 8 * rough.evaluate(windows).diff(dim=1)), 2)
    )
    first = pf.integrate(
        paths.controlled(straight, field), query, discretization="exact", return_final_state=True
    ).final_state
    assert (second - expected).norm() < (first - expected).norm() / 5


# --- steps that hold a tolerance --------------------------------------------------------------------------------------


def chirp(batch: int = 2, decay: str = "scalar", narrow: float = 0.02) -> DriverSource:
    """Rates that turn quickly for a short time, at another one in each sequence."""
    field = random_field(3, decay, rank=1)

    def rates(time: Tensor):
        time = time.expand(batch, -1)
        centre = torch.linspace(0.3, 0.6, batch, dtype=F64)[:, None]
        bump = torch.exp(-((time - centre) / narrow).square())
        speed = torch.stack((torch.ones_like(time), 20 * bump * torch.cos(40 * time), torch.sin(5 * time)), -1)
        return field.along(speed)

    return DriverSource(rates, torch.linspace(0, 1, 9, dtype=F64))


def fine_states(source: DriverSource, cuts: int = 512) -> Tensor:
    """The states at the grid's points, by the method of order 4 on a far finer grid."""
    share = torch.arange(cuts, dtype=F64) / cuts
    grid = torch.cat((source.grid[:-1, None].lerp(source.grid[1:, None], share).flatten(), source.grid[-1:]))
    steps = grid.shape[0] - 1
    driver = pf.discretize(DriverSource(source.rates, grid), "magnus4")
    batch = driver.rows[0].write.shape[0]
    positions = list(range(cuts, steps + 1, cuts))
    query = torch.zeros(batch, steps, 1, 4, dtype=F64)
    return pf.integrate(driver, query, state_positions=positions).states


@pytest.fixture(scope="module")
def states():
    return fine_states(chirp())


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-7])
def test_a_tolerance_is_held(states, tolerance):
    source = chirp()
    query = torch.randn(2, 8, 1, 4, dtype=F64)
    found = paths.solve(source, query, relative_tolerance=tolerance, absolute_tolerance=0.0)
    assert found.refinement.error <= 1
    size = torch.linalg.matrix_norm(states).amax(1)
    off = torch.linalg.matrix_norm(found.final_state - states[:, -1]) / size
    assert off.max() <= tolerance, off
    wrong = (found.output - read_out(states, query)).norm(dim=-1) / (query.norm(dim=-1) / 2 * size[:, None])
    assert wrong.max() <= tolerance
    grid = found.refinement.source.grid
    assert_close(grid[found.refinement.ends], source.grid[1:], 1e-15, "the old grid is part of the new")


def test_steps_go_where_they_are_needed():
    """Most of them into the tenth of the time where the rates turn; more of them for a stricter tolerance."""
    counts = []
    for tolerance in (1e-3, 1e-5):
        refinement = paths.refine(chirp(batch=1), relative_tolerance=tolerance, absolute_tolerance=0.0)
        grid = refinement.source.grid
        counts.append(grid.shape[0] - 1)
        inside = ((grid > 0.25) & (grid < 0.35)).float().mean()
        assert inside > 0.3, inside
    assert 2 < counts[1] / counts[0] < 10, counts  # order 4 would take √10 times as many, order 2 ten times


def test_good_steps_do_not_excuse_what_has_come_of_them(monkeypatch):
    """The steps' own errors may all be allowed and their sum not: here what comes of them is made 1000 times worse."""
    errors, seen = adaptive._errors, []

    def amplified(*arguments):
        own, total = errors(*arguments)
        seen.append((own.max().item(), 1000 * total.max().item()))
        return own, 1000 * total

    monkeypatch.setattr(adaptive, "_errors", amplified)
    refinement = paths.refine(chirp(batch=1), relative_tolerance=1e-3, absolute_tolerance=0.0)
    assert any(own <= 1 < total for own, total in seen), "no round had good steps and a bad sum"
    assert refinement.error == seen[-1][1] <= 1


@pytest.mark.parametrize("chosen", ["exact", Discretization("exact", "strang"), "cayley"])
def test_other_schemes_hold_a_tolerance_too(states, chosen):
    source = chirp(decay="vector" if isinstance(chosen, Discretization) else "scalar")
    if isinstance(chosen, Discretization):
        fine = DriverSource(source.rates, torch.linspace(0, 1, 4001, dtype=F64))
        query = torch.zeros(2, 4000, 1, 4, dtype=F64)
        expected = pf.integrate(fine, query, discretization=chosen, return_final_state=True).final_state
    else:
        expected = states[:, -1]
    query = torch.zeros(2, 8, 1, 4, dtype=F64)
    found = paths.solve(source, query, discretization=chosen, relative_tolerance=1e-3, absolute_tolerance=0.0)
    off = torch.linalg.matrix_norm(found.final_state - expected) / torch.linalg.matrix_norm(states).amax(1)
    assert off.max() <= 1e-3


def test_a_tolerance_that_cannot_be_held_raises():
    with pytest.raises(RuntimeError, match=r"relative_tolerance: got 1e-08 .*needs more than 64 steps.*times what is"):
        paths.refine(chirp(), relative_tolerance=1e-8, max_steps=64)
    field = random_field(3)
    broken = DriverSource(
        lambda t: field.along(torch.where(t < 0.4321, 1.0, NAN)[None, :, None].expand(1, -1, 3)),
        torch.linspace(0, 1, 3, dtype=F64),
    )
    with pytest.raises(RuntimeError, match=r"needs more digits than torch.float64.* is inf times .*begins at 0\.43"):
        paths.refine(broken)
    with pytest.raises(RuntimeError, match="relative_tolerance: got 1e-17"):
        paths.refine(chirp(), relative_tolerance=1e-17, absolute_tolerance=0)
    with pytest.raises(ValueError, match="discretization: got 'magnus4' with a log-decay a key channel"):
        paths.refine(chirp(decay="vector"))
    with pytest.raises(ValueError, match="relative_tolerance: got -1"):
        paths.refine(chirp(), relative_tolerance=-1)
    with pytest.raises(ValueError, match="expected one of them above 0"):
        paths.refine(chirp(), relative_tolerance=0, absolute_tolerance=0)
    with pytest.raises(ValueError, match=r"query: got shape \[2, 7, 1, 4\]"):
        paths.solve(chirp(), torch.zeros(2, 7, 1, 4, dtype=F64))


@pytest.mark.parametrize(("decay", "splitting"), [("scalar", None), ("vector", "lie"), ("vector", "strang")])
def test_the_flows_that_errors_are_estimated_from_are_the_engines(decay, splitting):
    driver = pf.discretize(chirp(decay=decay), Discretization("exact", splitting))
    state = torch.randn(2, 2, 4, 3, dtype=F64)
    query = torch.zeros(2, 8, 1, 4, dtype=F64)
    expected = pf.integrate(driver, query, initial_state=state, return_final_state=True).final_state
    _, after = _states(_flows(driver), state)
    assert_close(after[:, -1], expected, 1e-12)


def test_grids_of_a_sequence_each_and_initial_states():
    source = chirp()
    grids = torch.stack((source.grid, source.grid.square()))
    state = torch.randn(2, 2, 4, 3, dtype=F64)
    query = torch.randn(2, 8, 1, 4, dtype=F64)
    found = paths.solve(DriverSource(source.rates, grids), query, initial_state=state, relative_tolerance=1e-7)
    loose = paths.solve(source, query, initial_state=state, relative_tolerance=1e-7)
    assert_close(found.final_state, loose.final_state, 1e-6)
    assert_close(found.output[:1], loose.output[:1], 1e-6)
    assert (found.output[1:] - loose.output[1:]).abs().max() > 1e-3


def test_a_solution_is_differentiable():
    times, values = observations(batch=1, length=4, channels=1, dropped=0.0)
    field = random_field(2, "scalar", rank=1)
    query = torch.randn(1, 3, 1, 4, dtype=F64)

    def run(read: Tensor) -> Tensor:
        moved = paths.LinearField(read, field.write, field.value, field.log_decay)
        source = paths.controlled(paths.hermite(times, values), moved)
        return paths.solve(source, query, relative_tolerance=1e-3).output

    assert torch.autograd.gradcheck(run, field.read.clone().requires_grad_(), fast_mode=True)


def test_nothing_to_refine():
    """Constant rates, and steps of length 0 among them: the first round is the last."""
    path, field = paths.linear(*observations()), random_field(3, "scalar")
    still = paths.controlled(path, field, torch.tensor([0.0, 0.0, 0.0], dtype=F64))
    assert paths.refine(still).rounds == 1
    constant = DriverSource(
        lambda t: field.along(torch.full((1, t.shape[-1], 3), 0.3, dtype=F64)), torch.linspace(0, 9, 4, dtype=F64)
    )
    refinement = paths.refine(constant, relative_tolerance=1e-10)
    assert refinement.rounds == 1
    assert refinement.ends.tolist() == [2, 4, 6]  # what is returned are the halves
    assert math.isfinite(refinement.error)
