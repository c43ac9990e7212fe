"""More than 2^31 elements in a tensor: its tail is what a continuation from the state gives, to the bit."""

import pytest
import torch

pytest.importorskip("triton")

from parallelflow.kernels import delta

HEADS, SIZE, TAIL = 128, 128, 256
TIME = 2**31 // (HEADS * SIZE) + TAIL  # tokens, the last of them beyond
MEMORY = 60 * 2**30


def roomy() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= MEMORY


@pytest.mark.gpu
@pytest.mark.skipif(not roomy(), reason="needs a GPU with 60 GiB")
@pytest.mark.parametrize("tier", ["hopper", "triton"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_tail_is_a_continuation(tier, tied):
    if tier == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator, dtype=torch.bfloat16)

    key = torch.nn.functional.normalize(normal(1, TIME, 1, SIZE), dim=-1)
    query, value = normal(1, TIME, 1, SIZE) / SIZE**0.5, normal(1, TIME, HEADS, SIZE)
    beta, log_decay = normal(1, TIME, HEADS).sigmoid().float(), -normal(1, TIME, HEADS).float().abs()
    cotangent = normal(1, TIME, HEADS, SIZE)
    assert value.numel() > 2**31
    tensors, options = (query, key, value, beta, log_decay), {"tied": tied, "scale": 1.0, "tier": tier}
    head, tail = slice(None, TIME - TAIL), slice(TIME - TAIL, None)
    state = delta.forward(*(x[:, head] for x in tensors), need_final_state=True, **options)[1]

    output, final, saved = delta.forward(*tensors, need_final_state=True, save_for_backward=True, **options)
    gradients = delta.backward(*tensors, saved, cotangent, None, **options)[:5]
    found = [output[:, tail].clone(), final, *(gradient[:, tail].clone() for gradient in gradients)]
    del output, saved, gradients

    last = [x[:, tail].contiguous() for x in tensors]
    options["initial_state"] = state
    output, final, saved = delta.forward(*last, need_final_state=True, save_for_backward=True, **options)
    gradients = delta.backward(*last, saved, cotangent[:, tail], None, **options)[:5]
    for number, (got, expected) in enumerate(zip(found, [output, final, *gradients], strict=True)):
        assert expected.isfinite().all()
        assert torch.equal(got, expected), number
