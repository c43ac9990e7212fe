"""A Qwen3-Next, as Transformers builds it, switched over to this engine by one line, and back."""

import statistics
import time

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM, logging

from parallelflow.compat.transformers import accelerate

logging.set_verbosity_error()
torch.manual_seed(0)
model = Qwen3NextForCausalLM(  # an eighth as wide as the published one, with random weights
    Qwen3NextConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        eos_token_id=None,
    )
).eval()
prompt = torch.randint(3, 2000, (1, 512))


def prefill():
    with torch.no_grad():
        return model(prompt, use_cache=False).logits


def training_step():
    model.zero_grad()
    model(prompt, labels=prompt, use_cache=False).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def text():
    return model.generate(prompt[:, :64], max_new_tokens=16, do_sample=False, pad_token_id=0)


def milliseconds(call, rounds=3):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


expected = {call: call() for call in (prefill, training_step, text)}
before = {call: milliseconds(call) for call in (prefill, training_step)}

accelerated = accelerate(model)  # the one line
print(accelerated)
for call, reference in expected.items():
    result = call()
    if call is text:
        assert torch.equal(result, reference)
        print("text: the same", result.shape[1] - 64, "tokens")
    else:
        error = ((result - reference).norm() / reference.norm()).item()
        print(
            f"{call.__name__}: {before[call]:.0f} ms before, {milliseconds(call):.0f} ms now, results {error:.0e} apart"
        )
        assert error < 1e-5

accelerated.restore()
assert torch.equal(prefill(), expected[prefill])
print("restored")
