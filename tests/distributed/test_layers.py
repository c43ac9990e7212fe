"""Layers, convolutions and language models over ranks, beside one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from parallelflow.nn import LAYERS, KeysAndValues, SoftmaxAttention, make_layer, set_context_group
from parallelflow.nn.convolution import short_convolution, token_shift
from tests.cases import assert_close
from tests.distributed.cases import edges_of, weights

LENGTHS = {1: [17], 3: [7, 0, 10], 4: [1, 2, 8, 6], 7: [2, 1, 0, 1, 9, 3, 1]}
STARTS = [0, 0, 1, 8, 12, 12, 17]
WIDTH = 4


def share(group: Any, tensor: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    first, stop = edges_of(lengths)[group.rank() : group.rank() + 2]
    return tensor[:, first:stop]


def options_of(kind: str) -> dict[str, Any]:
    return {"num_heads": 2} if kind not in ("rwkv7", "mamba2") else {"head_dim": 8}


def build(kind: str, values: dict[str, torch.Tensor]) -> nn.Module:
    layer = make_layer(kind, 16, **options_of(kind)).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(values[name])
    return layer


def layer_on_rank(group, kind, values, inputs, starts, lengths, memory):
    layer = build(kind, values)
    set_context_group(layer, group)
    hidden_states = share(group, inputs, lengths).clone().requires_grad_()
    cu_seqlens = None if starts is None else torch.tensor(starts)
    mixed = layer(hidden_states, cu_seqlens=cu_seqlens, memory=memory if group.rank() == 0 else None)
    loss = (mixed.output * share(group, weights(inputs, 1), lengths)).sum()
    if mixed.memory is not None:
        loss = loss + sum((part * weights(part, 2)).sum() for part in mixed.memory if part is not None)
    loss.backward()
    there = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return mixed.output.detach(), hidden_states.grad, there, mixed.memory is not None


CASES = [(kind, packed) for kind in LAYERS for packed in (False, True) if not (packed and kind == "softmax_attention")]


@pytest.mark.parametrize(("kind", "packed"), CASES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_layers(ranks, kind, packed):
    """Output, gradients of the hidden states and (summed over ranks) of the parameters; memory in and out."""
    torch.manual_seed(0)
    layer = make_layer(kind, 16, **options_of(kind)).double()
    values = {name: nn.init.normal_(x, std=0.3).detach().clone() for name, x in layer.named_parameters()}
    inputs = torch.randn(1 if packed else 2, 17, 16, dtype=torch.float64)
    memory = None
    if not packed and kind != "softmax_attention":
        with torch.no_grad():
            memory = layer(torch.randn(2, 5, 16, dtype=torch.float64)).memory
    hidden_states = inputs.clone().requires_grad_()
    mixed = layer(hidden_states, cu_seqlens=torch.tensor(STARTS) if packed else None, memory=memory)
    loss = (mixed.output * weights(inputs, 1)).sum()
    if not packed:
        loss = loss + sum((part * weights(part, 2)).sum() for part in mixed.memory if part is not None)
    loss.backward()
    for size, lengths in LENGTHS.items():
        found = ranks.run(size, layer_on_rank, kind, values, inputs, STARTS if packed else None, lengths, memory)
        assert_close(torch.cat([each[0] for each in found], 1), mixed.output, 1e-10, "output")
        assert_close(torch.cat([each[1] for each in found], 1), hidden_states.grad, 1e-10, "gradient")
        for name, parameter in layer.named_parameters():
            total = sum(each[2][name] for each in found)
            assert_close(total, parameter.grad, 1e-10, name)
        assert [each[3] for each in found] == [not packed and rank == size - 1 for rank in range(size)]


def look_back_on_rank(group, inputs, weight, starts, lengths):
    mine = share(group, inputs, lengths).clone().requires_grad_()
    cu_seqlens = None if starts is None else torch.tensor(starts)
    around = {"cu_seqlens": cu_seqlens, "context_group": group, "context_lengths": lengths}
    convolved, _ = short_convolution(mine, weight, **around)
    shifted, _ = token_shift(mine, **around)
    ours = [share(group, weights(inputs, seed), lengths) for seed in (1, 2)]
    (convolved * ours[0] + shifted * ours[1]).sum().backward()
    return convolved.detach(), shifted.detach(), mine.grad


@pytest.mark.parametrize("starts", [None, STARTS], ids=["batch", "packed"])
@pytest.mark.parametrize("size", sorted(LENGTHS))
def test_what_looks_back_sees_the_ranks_before(ranks, size, starts):
    """Also across several ranks that have fewer tokens than the convolution is wide."""
    inputs = torch.randn(1, 17, 3, dtype=torch.float64)
    weight = torch.randn(3, 1, WIDTH, dtype=torch.float64)
    leaf = inputs.clone().requires_grad_()
    cu_seqlens = None if starts is None else torch.tensor(starts)
    convolved, _ = short_convolution(leaf, weight, cu_seqlens=cu_seqlens)
    shifted, _ = token_shift(leaf, cu_seqlens=cu_seqlens)
    (convolved * weights(inputs, 1) + shifted * weights(inputs, 2)).sum().backward()
    found = ranks.run(size, look_back_on_rank, inputs, weight, starts, LENGTHS[size])
    for place, whole in enumerate((convolved, shifted, leaf.grad)):
        assert_close(torch.cat([each[place] for each in found], 1), whole, 1e-13)


def attention_on_rank(group, wrong):
    layer = SoftmaxAttention(8, num_heads=2)
    set_context_group(layer, group)
    layer(torch.randn(1, 3, 8), **wrong)


@pytest.mark.parametrize("what", ["packed sequences", "a memory"])
def test_softmax_attention_says_what_it_does_not(ranks, what):
    memory = KeysAndValues(*torch.zeros(2, 1, 3, 2, 4), None)
    wrong = {"cu_seqlens": torch.tensor([0, 6])} if what == "packed sequences" else {"memory": memory}
    for answer, error in ranks.answers(2, attention_on_rank, wrong):
        assert error is not None
        assert f"context_group: got one with softmax attention and {what}" in answer


def compiled_on_rank(group, kind, values, inputs, lengths):
    """The gradient of the hidden states, from a layer and from the layer compiled."""
    layer = build(kind, values)
    set_context_group(layer, group)
    gradients = []
    for call in (layer, torch.compile(layer, backend="eager")):
        hidden_states = share(group, inputs, lengths).clone().requires_grad_()
        call(hidden_states).output.square().sum().backward()
        gradients.append(hidden_states.grad)
    return gradients


def test_a_compiled_layer_breaks_its_graph_and_goes_on(ranks):
    values = {
        name: parameter.detach()
        for name, parameter in make_layer("gated_delta_net", 16, num_heads=2).double().named_parameters()
    }
    inputs = torch.randn(1, 17, 16, dtype=torch.float64)
    for plain, compiled in ranks.run(2, compiled_on_rank, "gated_delta_net", values, inputs, [9, 8]):
        assert_close(compiled, plain, 1e-12)
