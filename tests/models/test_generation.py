"""Generation: what a cache gives is what the whole text gives, and padding changes nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from parallelflow.models import ParallelFlowCache
from parallelflow.nn import LAYERS
from tests.models.small import PAD, small_model, tokens

MIXED = ("gated_delta_net", "softmax_attention", "rwkv7", "mamba2", "rwkv7")

CLOSE = 2e-4
"""Of logits of size 30, in float32, where products are summed in different orders."""


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_a_cache_changes_nothing(layer):
    model = small_model(layer, layer).double()
    text = tokens(2, 23)
    whole = model(text, use_cache=False).logits
    cache = ParallelFlowCache(2)
    pieces = [model(text[:, a:b], past_key_values=cache).logits for a, b in [(0, 9), (9, 10), (10, 11), (11, 23)]]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)
    assert cache.get_seq_length() == 23


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(layer, side):
    model = small_model(layer, layer).double()
    lengths, width = [11, 4, 1], 11
    text, mask = tokens(3, width), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    if side == "right":
        mask = mask.flip(1)
    padded = model(text * mask + PAD * (1 - mask), attention_mask=mask)
    following = model(tokens(3, 1, seed=2), past_key_values=padded.past_key_values).logits
    for row in range(3):
        alone = model(text[row : row + 1, mask[row].bool()])
        after = model(tokens(3, 1, seed=2)[row : row + 1], past_key_values=alone.past_key_values).logits
        torch.testing.assert_close(padded.logits[row, mask[row].bool()], alone.logits[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(following[row], after[0], rtol=0, atol=1e-10)


def test_generate_with_and_without_a_cache():
    model, prompt = small_model(*MIXED), tokens(2, 7)
    cached = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert cached.shape == (2, 19)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False))


def test_generate_from_prompts_of_unequal_length():
    model, prompts, lengths = small_model(*MIXED), tokens(3, 9), [9, 2, 6]
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 9 - length :] = 1
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(prompts * mask, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = model.generate(prompts[row : row + 1, 9 - length :], **options)
        assert torch.equal(together.sequences[row, 9:], alone.sequences[0, length:])
        for padded, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(padded[row], expected[0], rtol=0, atol=CLOSE)


def test_beams_follow_their_memories():
    model, prompt = small_model("gated_delta_net", "softmax_attention"), tokens(2, 5)
    options = {"max_new_tokens": 8, "num_beams": 5, "do_sample": False}
    found = model.generate(prompt, **options)
    assert torch.equal(found, model.generate(prompt, use_cache=False, **options))
    assert not torch.equal(found, model.generate(prompt, max_new_tokens=8, do_sample=False)), "beams found nothing"


def test_memory_is_constant():
    model = small_model("gated_delta_net", "mamba2")
    sizes = []
    for length in (3, 60):
        out = model.generate(tokens(1, 4), max_new_tokens=length, do_sample=False, return_dict_in_generate=True)
        sizes.append(out.past_key_values.nbytes)
        held = {t.untyped_storage().nbytes() for layer in out.past_key_values.memories for t in layer.memory}
        assert max(held) <= max(t.nbytes for layer in out.past_key_values.memories for t in layer.memory)
    assert sizes[0] == sizes[1]


def test_generation_goes_on_from_a_cache():
    model, prompt = small_model(*MIXED), tokens(1, 6)
    start = model.generate(prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([start.sequences, tokens(1, 3, seed=5)], 1)
    again = model.generate(longer, past_key_values=start.past_key_values, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, model.generate(longer, max_new_tokens=5, do_sample=False))


@torch.no_grad()
def test_packed_sequences():
    model, text, cuts = small_model(*MIXED).double(), tokens(1, 15), torch.tensor([0, 6, 7, 15])
    packed = model(text, cu_seqlens=cuts).logits
    positions = torch.cat([torch.arange(6), torch.arange(1), torch.arange(8)]).unsqueeze(0)
    assert torch.equal(model(text, position_ids=positions).logits, packed)
    losses = [model(text, labels=text, **how).loss for how in ({"position_ids": positions}, {"cu_seqlens": cuts})]
    assert torch.equal(*losses)
    for start, stop in [(0, 6), (6, 7), (7, 15)]:
        alone = model(text[:, start:stop]).logits
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=0, atol=1e-10)


def test_errors():
    model, text = small_model("delta_net"), tokens(2, 5)
    with pytest.raises(TypeError, match="past_key_values: got DynamicCache"):
        model(text, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match=r"input_ids: got torch.float32 \[2, 5\], expected numbers of tokens"):
        model(text.float())
    with pytest.raises(ValueError, match=r"input_ids: got torch.int64 \[5\], expected numbers of tokens"):
        model(text[0])
    for outside in (-1, model.config.vocab_size):
        with pytest.raises(
            ValueError, match=f"input_ids: got tokens from .*, expected .* 0 to {model.config.vocab_size - 1}"
        ):
            model(text.index_fill(1, torch.tensor([2]), outside))
    with pytest.raises(TypeError, match="cu_seqlens: got list"):
        model(text[:1], cu_seqlens=[0, 5])
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 4\]"):
        model(text, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask: got numbers other than 0 and 1"):
        model(text, attention_mask=torch.tensor([[0, 1, 1, 1, 2], [1, 1, 1, 1, 1]]))
    with pytest.raises(TypeError, match="cache_position"):
        model(text, cache_position=torch.arange(5))
    with pytest.raises(ValueError, match="position_ids: got a 0 at 2 after 5"):
        model(text[:1], position_ids=torch.tensor([[5, 6, 0, 1, 2]]))
    with pytest.raises(ValueError, match="output_attentions"):
        model(text, output_attentions=True)
    with pytest.raises(ValueError, match="input_ids"):
        model()
    with pytest.raises(NotImplementedError, match="does not forget"):
        model(text, use_cache=True).past_key_values.crop(-1)
