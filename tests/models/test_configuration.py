"""Configurations, files, and the Auto classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from parallelflow.models import ParallelFlowConfig, ParallelFlowForCausalLM, ParallelFlowModel
from parallelflow.nn import LAYERS
from tests.models.small import small_config, small_model, tokens

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tmp_path, tied):
    model, text = small_model(*LAYERS, tie_word_embeddings=tied), tokens(1, 9)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    expected = model(text).logits
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), ParallelFlowForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(loaded, ParallelFlowForCausalLM)
        assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
        assert torch.equal(loaded(text).logits, expected)
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, ParallelFlowModel)
    assert torch.equal(body(text).last_hidden_state, model.model(text).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(text).logits.dtype == torch.bfloat16
    assert torch.isfinite(half(text).logits).all()


def test_a_configuration_makes_a_model():
    config = AutoConfig.for_model("parallelflow", **{"hidden_size": 16, "vocab_size": 11, "num_hidden_layers": 3})
    model = AutoModelForCausalLM.from_config(config)
    assert [type(block.attn) for block in model.model.layers] == [LAYERS["gated_delta_net"]] * 3


def test_the_pattern_is_repeated():
    model = small_model("delta_net", "delta_net", "softmax_attention", depth=7)
    kinds = [block.attn.__class__.__name__ for block in model.model.layers]
    assert kinds == ["DeltaNet", "DeltaNet", "SoftmaxAttention"] * 2 + ["DeltaNet"]


def test_initialisation():
    """Loaded and fresh models alike: projections normal, decays as the layers draw them, RWKV-7's outputs zero."""
    torch.manual_seed(0)
    config = small_config("gated_delta_net", "rwkv7", hidden_size=64, initializer_range=0.02)
    model = ParallelFlowForCausalLM(config)
    first, second = (block.attn for block in model.model.layers)
    assert 0.018 < first.q_proj.weight.std() < 0.022
    assert (first.A_log.exp() <= 16).all() and torch.nn.functional.softplus(first.dt_bias).max() <= 0.11
    assert not second.o_proj.weight.any() and (second.k_a == 1.02).all()
    assert (model.model.norm.weight == 1).all() and (first.o_norm.weight == 1).all()


def test_a_head_that_a_checkpoint_lacks_is_made_anew(tmp_path):
    model = small_model("gated_delta_net")
    model.model.save_pretrained(tmp_path)
    loaded = ParallelFlowForCausalLM.from_pretrained(tmp_path)
    for name, value in model.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert 0.01 < loaded.lm_head.weight.std() < 0.03


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": ["gated_deltanet"]}, ValueError, "layers: got 'gated_deltanet'.*did you mean 'gated_delta_net'"),
        ({"layers": []}, ValueError, "layers: got none"),
        ({"layer_options": {"gated_delta_net": {"head_dims": 4}}}, TypeError, "no option 'head_dims'.*'head_dim'"),
        ({"layer_options": {"rwkv7": {}}}, ValueError, "layer_options: got options of 'rwkv7'"),
        ({"hidden_sise": 4}, TypeError, "hidden_sise: unknown option.*hidden_size"),
        ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers: got 0"),
        ({"layers": "mamba2"}, TypeError, "layers: got 'mamba2', expected a list of names"),
        ({"layers": None}, TypeError, "layers: got None, expected a list of names"),
        ({"layer_options": ["mamba2"]}, TypeError, "layer_options: got .*expected keywords for kinds"),
        ({"layer_options": {"gated_delta_net": ["x"]}}, TypeError, "layer_options: got .*expected keywords for kinds"),
        ({"intermediate_size": 1.5}, TypeError, "intermediate_size: got 1.5"),
        ({"norm_eps": "1e-6"}, TypeError, "norm_eps: got '1e-6', expected a number"),
        ({"initializer_range": -1}, ValueError, "initializer_range: got -1"),
        ({"use_cache": "no"}, TypeError, "use_cache: got 'no', expected True or False"),
        ({"tie_word_embeddings": 1}, TypeError, "tie_word_embeddings: got 1, expected True or False"),
        ({"vocab_size": 8, "pad_token_id": 8}, ValueError, "pad_token_id: got 8, expected one of the 8 tokens"),
        ({"vocab_size": 8, "eos_token_id": [3, -1]}, ValueError, "eos_token_id: got -1"),
        ({"bos_token_id": "x"}, TypeError, "bos_token_id: got 'x', expected a token's number or None"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        ParallelFlowConfig(**options)


@pytest.mark.parametrize(
    ("package", "part"),
    [("transformers", "models"), ("transformers", "training"), ("safetensors", "training"), ("yaml", "training")],
)
def test_without_what_the_extra_installs(package, part):
    """The layers work, and the models and their training say what to install."""
    code = f"""
import sys
sys.modules["{package}"] = None
import parallelflow.nn
try:
    import parallelflow.{part}
except ImportError as error:
    assert "{package}" in str(error) and "pip install 'parallelflow[hf]'" in str(error), error
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
