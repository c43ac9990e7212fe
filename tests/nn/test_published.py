"""Layers against their published models, as Transformers computes them on a CPU: the same weights, the same outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from parallelflow.nn import GatedDeltaNet, KimiDeltaAttention, Mamba2

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
"""Of the largest output: both sides are float32, and sum in different orders."""

LAYER_TYPES = ["linear_attention", "full_attention"]
GROUPED = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
OURS_GROUPED = {"num_heads": 2, "num_value_heads": 4, "head_dim": 8, "value_head_dim": 6}
CHANNELWISE = {"linear_num_heads": 2, "linear_head_dim": 8, "rms_norm_eps": 1e-5}
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "layer_types": LAYER_TYPES, "num_attention_heads": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A published layer, its configuration, and the layer that takes its weights."""

    name: str
    model: str
    layer: str
    configuration: str
    options: dict[str, Any]
    ours: Callable[[], nn.Module]

    @property
    def config(self) -> Any:
        module = pytest.importorskip(f"transformers.models.{self.model}.configuration_{self.model}")
        return getattr(module, self.configuration)(**self.options)

    def pair(self) -> tuple[nn.Module, nn.Module]:
        module = pytest.importorskip(f"transformers.models.{self.model}.modeling_{self.model}")
        torch.manual_seed(0)
        published, ours = getattr(module, self.layer)(self.config, layer_idx=0).eval(), self.ours()
        for parameter in published.parameters():  # what some models leave empty, and larger values than theirs
            nn.init.normal_(parameter, std=0.4)
        ours.load_state_dict(published.state_dict())
        return published, ours


CASES = [
    Case(
        "Qwen3-Next",
        "qwen3_next",
        "Qwen3NextGatedDeltaNet",
        "Qwen3NextConfig",
        COMMON | GROUPED,
        lambda: GatedDeltaNet(32, **OURS_GROUPED, norm_eps=1e-6),
    ),
    Case(
        "Qwen3.5",
        "qwen3_5",
        "Qwen3_5GatedDeltaNet",
        "Qwen3_5TextConfig",
        COMMON | GROUPED,
        lambda: GatedDeltaNet(32, **OURS_GROUPED, norm_eps=1e-6),
    ),
    Case(
        "OLMo-Hybrid, negative eigenvalues",
        "olmo_hybrid",
        "OlmoHybridGatedDeltaNet",
        "OlmoHybridConfig",
        COMMON | GROUPED | {"linear_num_key_heads": 4, "linear_allow_neg_eigval": True},
        lambda: GatedDeltaNet(32, **OURS_GROUPED | {"num_heads": 4}, negative_eigenvalues=True),
    ),
    Case(
        "Kimi-Linear",
        "kimi_linear",
        "KimiLinearDeltaAttention",
        "KimiLinearConfig",
        COMMON | CHANNELWISE,
        lambda: KimiDeltaAttention(32, num_heads=2, head_dim=8),
    ),
    Case(
        "GLM-5, decay bounded below",
        "glm5_next",
        "Glm5NextTextLinearAttention",
        "Glm5NextTextConfig",
        COMMON | CHANNELWISE | {"num_key_value_heads": 2, "linear_lower_bound": -5.0},
        lambda: KimiDeltaAttention(32, num_heads=2, head_dim=8, lower_bound=-5.0),
    ),
    Case(
        "Bailing, gates of one matrix",
        "bailing_hybrid",
        "BailingHybridDeltaAttention",
        "BailingHybridConfig",
        COMMON | CHANNELWISE | {"kda_safe_gate": True, "kda_lower_bound": -5.0},
        lambda: KimiDeltaAttention(32, num_heads=2, head_dim=8, lower_bound=-5.0, low_rank_gates=False),
    ),
    Case(
        "Mamba-2",
        "mamba2",
        "Mamba2Mixer",
        "Mamba2Config",
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8},
            **{"state_size": 6, "n_groups": 2, "chunk_size": 16},
        },
        lambda: Mamba2(32, head_dim=8, state_size=6, num_groups=2),
    ),
]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.05, "nothing to compare"
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@torch.no_grad()
def test_outputs_are_the_published_layers(case):
    published, ours = case.pair()
    hidden_states = torch.randn(2, 37, 32)
    assert_close(ours(hidden_states).output, published(hidden_states))


@torch.no_grad()
def test_step_by_step_with_a_memory(case):
    published, ours = case.pair()
    hidden_states = torch.randn(2, 28, 32)
    cache, memory = transformers.DynamicCache(config=case.config), None
    for start, stop in [(0, 20), *((t, t + 1) for t in range(20, 28))]:
        expected = published(hidden_states[:, start:stop], cache_params=cache)
        actual, memory = ours(hidden_states[:, start:stop], memory=memory)
        assert_close(actual, expected)


@torch.no_grad()
def test_padding_on_the_left(case):
    published, ours = case.pair()
    hidden_states, mask = torch.randn(2, 19, 32), torch.ones(2, 19, dtype=torch.long)
    mask[0, :5] = 0
    actual = ours(hidden_states, attention_mask=mask).output
    expected = published(hidden_states, attention_mask=mask)
    assert_close(actual[mask.bool()], expected[mask.bool()])
    assert not actual[~mask.bool()].any()


def test_gradients_are_the_published_layers(case):
    published, ours = case.pair()
    hidden_states, weights = torch.randn(2, 21, 32), torch.randn(2, 21, 32)
    gradients = []
    for run in (lambda x: published(x), lambda x: ours(x).output):
        leaf = hidden_states.clone().requires_grad_()
        (run(leaf) * weights).sum().backward()
        gradients.append(leaf.grad)
    assert_close(gradients[1], gradients[0])


def test_a_foreign_state_dict_is_refused():
    layer = GatedDeltaNet(32, num_heads=2)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(nn.Linear(32, 32).state_dict())
