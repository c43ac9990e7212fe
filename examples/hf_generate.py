"""A language model with Hugging Face Transformers: configure, train, save, load, and generate from a padded batch."""

import tempfile

import torch
from transformers import AutoModelForCausalLM

from parallelflow.models import ParallelFlowConfig  # registers the model with the Auto classes

# Any pattern of layers: here three that flow, with a memory of constant size, then one of softmax attention.
config = ParallelFlowConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=4,
    layers=["gated_delta_net", "gated_delta_net", "gated_delta_net", "softmax_attention"],
    num_heads=2,
    intermediate_size=128,
    pad_token_id=0,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config)
print(f"{model.num_parameters():,} parameters:", [type(block.attn).__name__ for block in model.model.layers])

# Training is PyTorch's, or the Trainer's. Bytes are tokens, and one sentence is the text.
text = b"the state decays, and every token writes a row. "
line = torch.tensor(list(text * 6))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(61):
    starts = torch.randint(len(text), (8,))
    tokens = torch.stack([line[start : start + 96] for start in starts])
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # config.json and model.safetensors
    model = AutoModelForCausalLM.from_pretrained(folder)

# Prompts of unequal length are padded on the left and masked: each gets what it would get alone.
prompts = [b"the state decays, ", b"every token ", b"and "]
width = max(map(len, prompts))
tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
options = {"max_new_tokens": 24, "do_sample": False}
together = model.generate(tokens, attention_mask=(tokens > 0).long(), **options)
for prompt, row in zip(prompts, together, strict=True):
    print(f"{prompt.decode()!r} -> {bytes(row[width:].tolist()).decode(errors='replace')!r}")
    alone = model.generate(torch.tensor([list(prompt)]), **options)
    assert torch.equal(row[width:], alone[0, len(prompt) :])
