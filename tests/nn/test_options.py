"""Every option of every layer: what it takes, and what it refuses by its name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from parallelflow.nn import LAYERS, layer_options, make_layer

WIDTH = 16
LEAST: dict[str, dict[str, Any]] = {name: {"num_heads": 2} for name in LAYERS}
LEAST |= {"rwkv7": {"head_dim": 8}, "mamba2": {"head_dim": 8, "state_size": 6}}

FLAG = ([True, False], ["false", 1, None])
SIZE = ([2, 4], [0, -1, 1.5, "2", True, [2]])
SIZE_OR_NONE = (*[[*SIZE[0], None]], SIZE[1])
POSITIVE = ([0.5, 3], [0, -1.0, math.nan, math.inf, "1e-5", None, True])
OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "bias": FLAG,
    "conv_bias": FLAG,
    "conv_size": ([1, 3], [-1, 1.5, "4", False, None]),
    "correction_factor": ([0, -1.5], ["1", None, math.nan]),
    "decay_rank": SIZE,
    "discretization": (["euler", "cayley", "rk4"], ["magic", 3, None, "magnus4"]),
    "engine": (
        [None, {"chunk_size": 4, "solver": "substitution"}],
        ["torch", 3, {"solvr": "x"}, {"solver": "x"}, {"chunk_size": 0}, {"initial_state": None}, {"validate": 1}],
    ),
    "expand": SIZE,
    "forget_gate": FLAG,
    "gate_rank": SIZE_OR_NONE,
    "head_dim": SIZE,
    "inner_decay": FLAG,
    "layer_index": ([0], [-1, 1, 0.5, None, True]),
    "low_rank_gates": FLAG,
    "lower_bound": ([-5, -0.5, None], [0, 2, math.nan, -math.inf, "-5", True]),
    "negative_eigenvalues": FLAG,
    "norm_eps": POSITIVE,
    "num_groups": ([1, 2], SIZE[1]),
    "num_heads": (SIZE[0], [*SIZE[1], 3]),  # of 16 channels
    "num_householder": ([1, 3], [*SIZE[1], None]),
    "num_key_value_heads": ([1, 2, None], SIZE[1]),
    "num_layers": ([1, 3], [*SIZE[1], None]),
    "num_value_heads": SIZE_OR_NONE,
    "output_correction": FLAG,
    "output_gate": ([None, "silu", "sigmoid"], ["relu", True, False, ["silu"]]),
    "rank": ([1, 3], [*SIZE[1], None]),
    "rate_rank": SIZE_OR_NONE,
    "rope_theta": POSITIVE,
    "state_size": SIZE,
    "temperature": POSITIVE,
    "tied": FLAG,
    "time_step_limit": ([(0.0, 0.1), [0, math.inf]], [0.1, None, (0,), (0.2, 0.1), (-1, 1), ("0", 1), (0, math.nan)]),
    "value_head_dim": SIZE_OR_NONE,
    "value_rank": SIZE_OR_NONE,
    "value_residual": ([None, False], ["false", 1]),
}  # fmt: skip
CASES = [(name, option) for name in LAYERS for option in layer_options(name)]


def use(name: str, **options: Any) -> Tensor:
    """Forward and backward: the gradient of the hidden states."""
    torch.manual_seed(0)
    layer = make_layer(name, WIDTH, **(LEAST[name] | options))
    hidden_states = torch.randn(2, 5, WIDTH, requires_grad=True)
    layer(hidden_states).output.square().sum().backward()
    assert hidden_states.grad is not None
    return hidden_states.grad


@pytest.mark.parametrize(("name", "option"), CASES)
def test_what_an_option_takes(name: str, option: str) -> None:
    for value in OPTIONS[option][0]:
        assert use(name, **{option: value}).isfinite().all()


@pytest.mark.parametrize(("name", "option"), CASES)
def test_what_an_option_refuses(name: str, option: str) -> None:
    for value in OPTIONS[option][1]:
        with pytest.raises((TypeError, ValueError), match=rf"^{option}: got ") as caught:
            use(name, **{option: value})
        assert "expected" in str(caught.value)


def test_what_a_layer_decides_itself_is_none_of_its_options():
    for name in LAYERS:
        assert not {"rows", "key_rows", "low_rank_gate"} & set(layer_options(name))
        with pytest.raises(TypeError, match=f"low_rank_gate: {name} has no such option"):
            make_layer(name, WIDTH, low_rank_gate=True)
