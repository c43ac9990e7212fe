"""Orders of convergence on drivers that vary in time, against a reference of matrix exponentials on a fine grid.

A scheme of order p makes errors that shrink by 2^p when steps are halved; the slope of log error over log step is
within 0.1 of p.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import parallelflow as pf
from parallelflow import Discretization, DriverSource, Factor, LowRankDriver, Row
from tests.cases import assert_close

F64 = torch.float64
RANK, KEY, VALUE = 2, 4, 3


def smooth(*shape: int, seed: int):
    """A smooth function of time with values ``[..., *shape]``."""
    generator = torch.Generator().manual_seed(seed)
    constant, *waves = torch.randn(3, *shape, generator=generator, dtype=F64) / 2

    def at(time: Tensor) -> Tensor:
        time = time.reshape(*time.shape, *(1 for _ in shape))
        return constant + waves[0] * torch.sin(2 * time) + waves[1] * torch.cos(3 * time)

    return at


READ, WRITE, VALUES = (smooth(RANK, 1, width, seed=n) for n, width in ((1, KEY), (2, KEY), (3, VALUE)))
RATES = {"none": None, "scalar": smooth(1, seed=4), "vector": smooth(1, KEY, seed=5)}


def source_of(decay: str, grid: Tensor, order: str = "simultaneous", rows: bool = True) -> DriverSource:
    def rates(time: Tensor) -> LowRankDriver:
        time = time if time.ndim == 2 else time[None]
        rate = RATES[decay]
        log_decay = None if rate is None else -0.3 - rate(time).square()
        read = Factor(READ(time)) if rows else None
        return LowRankDriver((Row(WRITE(time), read, Factor(VALUES(time))),), log_decay, order)

    return DriverSource(rates, grid)


STATE = torch.randn(1, 1, KEY, VALUE, dtype=F64, generator=torch.Generator().manual_seed(6))


def final_state(decay: str, steps: int, discretization, **more) -> Tensor:
    source = source_of(decay, torch.linspace(0, 1, steps + 1, dtype=F64), **more)
    query = torch.zeros(1, steps, 1, KEY, dtype=F64)
    return pf.integrate(
        source, query, discretization=discretization, initial_state=STATE, return_final_state=True
    ).final_state


def reference(decay: str, steps: int = 4000) -> Tensor:
    """The product of dense exponentials of the commutator-free Magnus method of order 4, K × K, on a fine grid."""
    nodes = [0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6]
    left = torch.linspace(0, 1, steps + 1, dtype=F64)[:-1]
    generators = []
    for node in nodes:
        time = left + node / steps
        read, write, value = (f(time)[:, :, 0] for f in (READ, WRITE, VALUES))
        matrix = write.mT @ read
        if RATES[decay] is not None:
            rate = -0.3 - RATES[decay](time).square()
            matrix = matrix + torch.diag_embed(rate[:, 0] if decay == "vector" else rate.expand(-1, KEY))
        top = torch.cat((matrix, write.mT @ value), -1)
        generators.append(torch.nn.functional.pad(top, (0, 0, 0, VALUE)) / steps)
    early, late = 0.25 + math.sqrt(3) / 6, 0.25 - math.sqrt(3) / 6
    first = torch.linalg.matrix_exp(early * generators[0] + late * generators[1])
    second = torch.linalg.matrix_exp(late * generators[0] + early * generators[1])
    flow = torch.eye(KEY + VALUE, dtype=F64)
    for one, two in zip(first, second, strict=True):
        flow = two @ one @ flow
    return flow[:KEY, :KEY] @ STATE + flow[:KEY, KEY:]


@pytest.fixture(scope="module")
def references():
    return {decay: reference(decay) for decay in RATES}


def measured_order(expected: Tensor, decay: str, discretization, **more) -> float:
    counts = [64, 96, 128, 192, 256]
    errors = [(final_state(decay, n, discretization, **more) - expected).norm().item() for n in counts]
    assert errors[-1] > 1e-13, errors  # else it is rounding that is measured
    x, y = (torch.tensor(v, dtype=F64).log() for v in (counts, errors))
    return -((x - x.mean()) * (y - y.mean())).sum().item() / (x - x.mean()).square().sum().item()


ORDERS = [
    *((scheme, "left", 1) for scheme in ("euler", "backward_euler", "cayley", "rk4", "exact")),
    *((scheme, None, 2) for scheme in ("cayley", "rk4", "exact")),
    *((scheme, None, 1) for scheme in ("euler", "backward_euler")),
    ("magnus4", None, 4),
]


@pytest.mark.parametrize("decay", ["none", "scalar"])
@pytest.mark.parametrize(("scheme", "node", "order"), ORDERS)
def test_order(references, decay, scheme, node, order):
    found = measured_order(references[decay], decay, Discretization(scheme, node=node))
    assert abs(found - order) <= 0.1, found


@pytest.mark.parametrize(("splitting", "order"), [("lie", 1), ("strang", 2)])
def test_order_of_splittings(references, splitting, order):
    for scheme in ("exact", "cayley"):
        found = measured_order(references["vector"], "vector", Discretization(scheme, splitting))
        assert abs(found - order) <= 0.1, (scheme, found)


@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_sequential_rows_are_of_order_1(references, decay):
    found = measured_order(references[decay], decay, "exact", order="sequential")
    assert abs(found - 1) <= 0.1, found


def test_rk4_is_of_order_4_on_rows_that_do_not_change():
    """Also under a decay, which it integrates exactly."""
    inputs = {
        "value": VALUES(torch.zeros(1, 1, dtype=F64)),
        "read": READ(torch.zeros(1, 1, dtype=F64)),
        "write": WRITE(torch.zeros(1, 1, dtype=F64)),
    }
    inputs = {name: 4 * x for name, x in inputs.items()}
    for rate in (None, torch.full((1, 1, 1), -2.0, dtype=F64)):
        errors = []
        exact = None
        for steps in (1, 16, 24, 32):
            many = {name: x.expand(-1, steps, *x.shape[2:]) for name, x in inputs.items()}
            found = pf.low_rank_flow(
                torch.zeros(1, steps, 1, KEY, dtype=F64), **many, initial_state=STATE, return_final_state=True,
                log_decay=None if rate is None else rate.expand(-1, steps, -1),
                discretization=Discretization("exact" if steps == 1 else "rk4", step=1 / steps),
            ).final_state  # fmt: skip
            exact = found if exact is None else exact
            errors.append((found - exact).norm().item())
        slope = math.log(errors[1] / errors[3]) / math.log(2)
        assert abs(slope - 4) <= 0.1, (rate, slope)


def test_magnus_is_exact_on_rates_that_do_not_change():
    grid = torch.tensor([0.0, 0.2, 1.0, 1.0], dtype=F64)
    for decay in ("none", "scalar"):
        still = source_of(decay, grid)
        frozen = DriverSource(lambda time, still=still: still.rates(torch.full_like(time, 0.3)), grid)
        query = torch.randn(1, 3, 1, KEY, dtype=F64)
        results = [
            pf.integrate(frozen, query, discretization=scheme, initial_state=STATE).output
            for scheme in ("magnus4", "exact")
        ]
        assert_close(results[0], results[1], 1e-13, decay)


def test_magnus_on_rows_that_only_write():
    """Then it is a quadrature of order 4, and its rows still only write."""
    source = source_of("scalar", torch.linspace(0, 1, 9, dtype=F64), rows=False)
    driver = pf.discretize(source, "magnus4")
    assert all(row.read is None for row in driver.rows)
    errors = []
    exact = None
    for steps in (512, 16, 32):
        found = final_state("scalar", steps, "magnus4", rows=False)
        exact = found if exact is None else exact
        errors.append((found - exact).norm().item())
    assert abs(math.log2(errors[1] / errors[2]) - 4) <= 0.1, errors


def test_grids_of_a_sequence_each_and_gradients_of_the_times():
    grids = torch.stack((torch.linspace(0, 1, 7, dtype=F64), torch.linspace(0, 1, 7, dtype=F64).square()))
    query = torch.randn(2, 6, 1, KEY, dtype=F64)

    def run(grids: Tensor, scheme: str = "magnus4") -> Tensor:
        return pf.integrate(source_of("scalar", grids), query, discretization=scheme).output

    together = run(grids)
    for n in range(2):
        alone = pf.integrate(source_of("scalar", grids[n]), query[n : n + 1], discretization="magnus4").output
        assert_close(together[n : n + 1], alone, 1e-14)
    for scheme in ("magnus4", "exact"):
        assert torch.autograd.gradcheck(lambda x, s=scheme: run(x, s), grids.clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: (source_of("vector", g), "magnus4"), "discretization: got 'magnus4' with a log-decay a key channel"),
        (
            lambda g: (source_of("none", g, order="sequential"), "magnus4"),
            "discretization: got 'magnus4' with sequential",
        ),
        (lambda g: (source_of("none", g), None), "discretization: got none with a DriverSource"),
        (lambda g: (source_of("none", g), Discretization("exact", step=0.1)), "step: got one with a DriverSource"),
        (lambda g: (source_of("none", g[:1]), "exact"), r"grid: got shape \[1\]"),
        (lambda g: (DriverSource(lambda t: source_of("none", g).rates(t[:2]), g), "exact"), "rates: returned rows of"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        pf.discretize(*make(torch.linspace(0, 1, 5, dtype=F64)))
