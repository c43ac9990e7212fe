"""In 16 and 32 bits over ranks: within what rounding inputs and outputs makes, whichever backend runs."""

from __future__ import annotations

import pytest
import torch

from parallelflow.kernels.cpu import build
from parallelflow.testing import FLOOR, Sizes, relative_error, round_inputs
from tests.cases import STRUCTURES, assert_close, by_name
from tests.distributed.cases import alone, expect_same, on_rank
from tests.distributed.test_sharded import model

SIZES = Sizes(1, 150, 1, 2, 24, 24)
LENGTHS = [40, 21, 70, 19]


def tensors_of(found: dict) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in found.items() if tensor is not None and name != "d state"}


def joined(found: list[dict]) -> dict[str, torch.Tensor]:
    whole = {"final": found[-1]["final"]}
    for name, first in found[0].items():
        if name not in ("final", "d state"):
            parts = [each[name] for each in found]
            whole[name] = torch.cat(parts, 1) if first.ndim > 1 else sum(part.double() for part in parts)
    return whole


@pytest.mark.parametrize("case", STRUCTURES, ids=by_name)
def test_bfloat16_over_ranks_is_within_the_budget(ranks, case):
    """Outputs, final states and gradients: twice the error of rounding what goes in and what comes out. Outputs are
    summed unrounded, so that theirs is one device's but for the few that fall on another side of a rounding."""
    inputs = case.inputs(case.sizes(SIZES))
    narrow = round_inputs(inputs, torch.bfloat16, keep=("log_decay",))
    call = (case.function, case.options)
    reference = tensors_of(alone(call, inputs, None, None))
    rounded = tensors_of(alone(call, {name: x.double() for name, x in narrow.items()}, None, None))
    found = joined(ranks.run(4, on_rank, call, narrow, None, None, LENGTHS, {}))
    assert found.keys() == reference.keys()
    for name, exact in reference.items():
        unavoidable = relative_error(rounded[name].to(found[name].dtype), exact)
        error = relative_error(found[name], exact)
        assert error <= max(2 * unavoidable, FLOOR), f"{name}: {error:.2e}, allowed {2 * unavoidable:.2e}"
    one = relative_error(alone(call, narrow, None, None)["output"], reference["output"])
    assert relative_error(found["output"], reference["output"]) <= 1.01 * one


@pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule", "retention", "ssd"])
def test_the_compiled_kernels_over_ranks(ranks, name):
    """The same flows from another backend: what runs is the kernels, with more value channels than the model has."""
    case = model(name)
    inputs = {key: tensor.float() for key, tensor in case.inputs(case.sizes(SIZES)).items()}
    state = torch.randn(1, 2, 24, 24, generator=torch.Generator().manual_seed(0))
    call = (case.function, {"backend": "cpu"})
    expected = alone((case.function, {}), inputs, state, None)
    found = ranks.run(4, on_rank, call, inputs, state, None, LENGTHS, {})
    expect_same(expected, found, 2e-5)


def autocast_on_rank(group, *arguments):
    with torch.autocast("cpu", torch.bfloat16):
        return on_rank(group, *arguments)


def test_autocast_leaves_states_alone(ranks):
    """Vectors are rounded as on one device; what the ranks exchange and compose is not."""
    case = model("kimi_delta_attention")
    inputs = {name: tensor.float() for name, tensor in case.inputs(case.sizes(SIZES)).items()}
    call = (case.function, {"backend": "torch"})
    with torch.autocast("cpu", torch.bfloat16):
        expected = alone(call, inputs, None, None)
    found = ranks.run(4, autocast_on_rank, call, inputs, None, None, LENGTHS, {})
    assert_close(found[-1]["final"], expected["final"], 1e-5)
    assert found[0]["output"].dtype == torch.bfloat16
