"""Transformers' models on this engine: the same logits, gradients, caches and text, and nothing else touched."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pathlib
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from parallelflow.compat.transformers import accelerate, functions, switch  # noqa: E402

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ALTERNATING = {"layer_types": ["linear_attention", "full_attention"]}
GATED_DELTA = {
    **COMMON,
    **ALTERNATING,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LATENT = {
    **COMMON,
    **ALTERNATING,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MAMBA = {
    **COMMON,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 12,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
CONFIGURATIONS = {
    "qwen3_next": {**GATED_DELTA, **EXPERTS},
    "qwen3_5_text": GATED_DELTA,
    "qwen3_5_moe_text": {**GATED_DELTA, **EXPERTS},
    "qwen4_exp_text": {
        **GATED_DELTA,
        **EXPERTS,
        "layer_types": ["linear_attention", "indexed_attention"],
        "hc_count": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 50,
        "ple_embed_dim": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "olmo_hybrid": GATED_DELTA,
    "kimi_linear": {**LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": {**LATENT, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    "minimax": {**COMMON, **ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16},
    "mamba2": {
        **{name: COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")},
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 12,
        "n_groups": 2,
        "chunk_size": 16,
        "initializer_range": 0.1,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**COMMON, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 12},
    "granitemoehybrid": {**MAMBA, **ALTERNATING, "shared_intermediate_size": 16, "num_local_experts": 4},
    "nemotron_h": {**COMMON, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 12, "n_groups": 2},
    "zamba2": {
        **COMMON,
        "layers_block_type": ["linear_attention", "hybrid"],
        "mamba_d_state": 12,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "chunk_size": 16,
    },
}


GLM5 = {
    **LATENT,
    "layer_types": ["linear_attention", "indexed_attention"],
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "n_routed_experts": 4,
    "qk_rope_head_dim": 0,
    "q_lora_rank": 16,
    "mlp_layer_types": ["dense", "sparse"],
    "index_topk": 64,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_kpool": 4,
    "indexer_types": ["full", "full"],
    "hc_mult": 2,
}
"""Its text model has no language-modelling head of its own: tested apart."""

OTHERS = {
    "mamba": ("MambaConfig", "MambaForCausalLM", "MambaMixer is Mamba-1"),
    "falcon_mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", "FalconMambaMixer is Mamba-1"),
    "jamba": ("JambaConfig", "JambaForCausalLM", "JambaMambaMixer is Mamba-1"),
    "zamba": ("ZambaConfig", "ZambaForCausalLM", "ZambaMambaMixer is Mamba-1"),
    "recurrent_gemma": ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", "RecurrentGemmaRglru is a recurrence"),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", "RwkvSelfAttention is RWKV-4"),
    "xlstm": ("xLSTMConfig", "xLSTMForCausalLM", "xLSTMLayer is mLSTM"),
}
"""Recurrent models that are not on this engine."""


@functools.cache
def configuration(name):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[name](**CONFIGURATIONS[name])


def build(name, **changes):
    config = copy.deepcopy(configuration(name))
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # gates away from the values that a fresh model starts from
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.rpartition(".")[2] in ("A_log", "dt_bias", "D"):
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def prompt(length=37):
    torch.manual_seed(1)
    return torch.randint(3, 97, (2, length))


def close(actual, expected, what, tolerance=1e-5):
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error < tolerance, f"{what}: relative error {error:.1e}"


def loss_and_gradients(model, ids):
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_and_gradients(name):
    model, ids = build(name).train(), prompt()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logits, gradients = loss_and_gradients(model, ids)
    gradients = {parameter: gradient.clone() for parameter, gradient in gradients.items()}
    with accelerate(model) as handle:
        assert handle.replaced
        ours, our_gradients = loss_and_gradients(model, ids)
    close(ours, logits, "logits")
    assert our_gradients.keys() == gradients.keys()
    largest = max(gradient.norm() for gradient in gradients.values())
    for parameter, gradient in gradients.items():  # a small gradient is a sum of large ones, with their rounding
        error = (our_gradients[parameter] - gradient).norm()
        assert error < 1e-5 * max(gradient.norm(), largest / 10), f"{parameter}: {error:.1e} of {gradient.norm():.1e}"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_left_padding_and_text(name):
    """Padded prompts are read as Transformers reads them, and the greedy continuations are the same."""
    model, ids = build(name), prompt(19)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    ids[0, :6] = 5  # not the padding token, whose embedding is zero: the mask alone keeps these out
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True,
               "output_logits": True}  # fmt: skip
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        text = model.generate(ids, **options)
        with accelerate(model):
            close(model(ids, attention_mask=mask).logits[mask.bool()], logits[mask.bool()], "logits")
            ours = model.generate(ids, **options)
    assert torch.equal(ours.sequences, text.sequences)
    close(torch.stack(ours.logits), torch.stack(text.logits), "logits while decoding")


def read_and_decode(model, ids, reading, decoding):
    """Logits of the last three tokens, one by one, after the others at once: each on either engine."""
    with reading:
        output = model(ids[:, :-3], use_cache=True)
    argument = "cache_params" if "cache_params" in output else "past_key_values"
    cache, logits = output[argument], []
    with decoding:
        for token in ids[:, -3:].split(1, 1):
            logits += [model(token, **{argument: cache}, use_cache=True).logits]
    return torch.cat(logits, 1)


class Switched:
    """``accelerate`` when entered, not when made."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.handle = accelerate(self.model)

    def __exit__(self, *_):
        self.handle.restore()


@pytest.mark.parametrize("name", CONFIGURATIONS)
@torch.no_grad()
def test_caches_change_hands(name):
    """A prompt on one engine, tokens on the other: the caches' layouts are one."""
    model, ids, theirs = build(name), prompt(23), contextlib.nullcontext()
    expected = read_and_decode(model, ids, theirs, theirs)
    close(read_and_decode(model, ids, Switched(model), theirs), expected, "logits of tokens on theirs")
    close(read_and_decode(model, ids, theirs, Switched(model)), expected, "logits of tokens on ours")


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear", "mamba2", "minimax"])
def test_it_is_this_engine_that_runs(name, monkeypatch):
    """With Transformers' own functions broken the accelerated model still runs, and another one does not."""
    model, other, ids = build(name), build(name), prompt(5)

    def broken(*_, **__):
        raise RuntimeError("Transformers' function was called")

    layers = [layer for layer in model.modules() if "forward" in vars(layer)]
    assert not layers
    handle = accelerate(model)
    names = {each for replaced in handle.replaced.values() for each in replaced}
    for layer in (model.get_submodule(path) for path in handle.replaced):
        module = sys.modules[type(layer).__module__]
        if names == {"forward"}:
            monkeypatch.setattr(type(layer), "forward", broken)
        for each in names - {"forward"}:
            monkeypatch.setattr(module, each, broken)
    with torch.no_grad():
        model(ids)
        model.generate(ids, max_new_tokens=2, do_sample=False)
        with pytest.raises(RuntimeError, match="Transformers' function"):
            other(ids)
        handle.restore()
        with pytest.raises(RuntimeError, match="Transformers' function"):
            model(ids)


def test_report_and_restore():
    model = build("qwen3_next", layer_types=["linear_attention", "linear_attention"])
    before = {name: dict(vars(layer)) for name, layer in model.named_modules()}
    keys = list(model.state_dict())
    handle = accelerate(model)
    functions = ("causal_conv1d_fn", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    assert handle.replaced == {f"model.layers.{i}.linear_attn": functions for i in (0, 1)}
    assert "Qwen3NextForCausalLM: 2 layers on ParallelFlow" in str(handle)
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="replaced already"):
        accelerate(model)
    handle.restore()
    handle.restore()
    assert {name: dict(vars(layer)) for name, layer in model.named_modules()} == before
    accelerate(model).restore()


def test_saved_whole_it_is_transformers_own():
    """Only names are saved; what is loaded can be accelerated anew."""
    model, file = build("qwen3_next"), io.BytesIO()
    with accelerate(model):
        torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.model.layers[0].linear_attn.forward.__func__ is type(model.model.layers[0].linear_attn).forward
    with torch.no_grad(), accelerate(loaded):
        close(loaded(prompt()).logits, model(prompt()).logits, "logits")


def test_a_copy_is_accelerated_too():
    """A deep copy has layers of its own, which use their own weights."""
    model, ids = build("qwen3_next"), prompt(9)
    with torch.no_grad(), accelerate(model):
        twin = copy.deepcopy(model)
        close(twin(ids).logits, model(ids).logits, "logits")
        for parameter in model.parameters():
            parameter.zero_()
        assert twin(ids).logits.norm() > 0


def test_what_cannot_be_replaced():
    with pytest.raises(
        ValueError, match=r"got Sequential, in which nothing can be replaced, expected .* mamba2_chunk_scan"
    ):
        accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="model: got int"):
        accelerate(3)
    model = build("qwen3_next")
    layer = model.model.layers[0].linear_attn
    layer.forward = lambda *_, **__: None
    with pytest.raises(ValueError, match=r"model\.layers\.0\.linear_attn\.forward is replaced already"):
        accelerate(model)


def test_every_model_that_calls_these_functions_is_tested():
    """Of the installed version: a model that a new one brings must be added above."""
    root = pathlib.Path(transformers.__file__).parent / "models"
    words = [f"def {name}(" for name in functions.MODELS] + [f"class {name}(" for name in switch._WHOLE]
    calling = {file.parent.name for file in root.glob("*/modeling_*.py") if any(w in file.read_text() for w in words)}
    assert calling == {name.removesuffix("_text") for name in [*CONFIGURATIONS, "glm5_next"]}


@torch.no_grad()
def test_glm5():
    modeling = pytest.importorskip("transformers.models.glm5_next.modeling_glm5_next")
    torch.manual_seed(0)
    model, ids = modeling.Glm5NextTextModel(modeling.Glm5NextTextConfig(**GLM5)).eval(), prompt()
    expected = model(ids).last_hidden_state
    with accelerate(model) as handle:
        assert len(handle.replaced) == 1
        close(model(ids).last_hidden_state, expected, "hidden states")


@pytest.mark.parametrize("name", OTHERS)
def test_other_recurrent_models_are_refused_by_name(name):
    config, model, why = OTHERS[name]
    with torch.device("meta"):
        made = getattr(transformers, model)(getattr(transformers, config)())
    with pytest.raises(ValueError, match=f"got {model}, in which nothing can be replaced .*{why}"):
        accelerate(made)


def test_under_a_hook_that_moves_weights():
    """Such a hook (Accelerate's) keeps the layer's own forward as ``_old_forward``: it, and the hook, still run."""
    model, ids, calls = build("qwen3_next"), prompt(9), []
    with torch.no_grad():
        expected = model(ids).logits
    layer = model.model.layers[0].linear_attn
    layer._old_forward = layer.forward

    def hooked(*args, **keywords):
        calls.append(layer._old_forward.__func__)
        return layer._old_forward(*args, **keywords)

    layer.forward = hooked
    with torch.no_grad(), accelerate(model):
        close(model(ids).logits, expected, "logits")
        assert calls[-1] is not type(layer).forward
    with torch.no_grad():
        model(ids)
    assert calls[-1] is type(layer).forward


@pytest.mark.parametrize("by", ["cu_seq_lens_q", "seq_idx"])
def test_packed_sequences(by):
    """Without a kernel package Transformers refuses them; here each sequence is as if alone."""
    model = build("qwen3_next", layer_types=["linear_attention", "linear_attention"])
    first, second = prompt(21)[:1], prompt(30)[1:]
    ids = torch.cat([first, second], 1)
    position_ids = torch.cat([torch.arange(21), torch.arange(30)])[None]
    packed = {"cu_seq_lens_q": torch.tensor([0, 21, 51], dtype=torch.int32), "position_ids": position_ids}
    if by == "seq_idx":
        packed["seq_idx"] = torch.tensor([[0] * 21 + [1] * 30], dtype=torch.int32)
    with torch.no_grad(), accelerate(model):
        logits = model(ids, use_cache=False, **packed).logits
        close(logits[:, :21], model(first, use_cache=False).logits, "the first sequence")
        close(logits[:, 21:], model(second, use_cache=False).logits, "the second sequence")


def test_compiled_layers_use_it(monkeypatch):
    """The compiler reads the replaced functions, not those of the module that the layer comes from."""
    model = build("qwen3_next")
    layer, states = model.model.layers[0].linear_attn, torch.randn(1, 70, 32)
    with torch.no_grad():
        expected = layer(states)
        with accelerate(model):
            module = sys.modules[type(layer).__module__]
            for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn"):
                monkeypatch.setattr(module, name, None)
            close(torch.compile(layer, backend="eager", fullgraph=True)(states), expected, "output")


def test_bfloat16():
    """In bfloat16 the two are as close to float32 as each other."""
    model, ids = build("qwen3_next"), prompt()
    with torch.no_grad():
        exact = model(ids).logits
        model.bfloat16()
        theirs = model(ids).logits.float()
        with accelerate(model):
            ours = model(ids).logits
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).norm() < 2 * (theirs - exact).norm()
