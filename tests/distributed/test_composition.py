"""Together with data parallelism (DDP, FSDP2) on a mesh of two dimensions, and with heads over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from parallelflow import functional
from parallelflow.models import ParallelFlowConfig, ParallelFlowForCausalLM
from parallelflow.nn import set_context_group
from parallelflow.testing import Sizes, make_inputs
from tests.cases import assert_close
from tests.distributed.cases import weights
from tests.distributed.ranks import Ranks

TIME = 21
STARTS = [0, 4, 4, 11, 21]
"""On four ranks of 6, 5, 5 and 5 tokens: inside one, and at an edge."""


@pytest.fixture(scope="module")
def four():
    made = Ranks(4, (4,))
    yield made
    made.stop()


def small_model():
    torch.manual_seed(0)
    config = ParallelFlowConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=3, num_heads=2, intermediate_size=24,
        layers=["gated_delta_net", "rwkv7", "mamba2"],
        layer_options={"rwkv7": {"head_dim": 8}, "mamba2": {"head_dim": 8}},
    )  # fmt: skip
    return ParallelFlowForCausalLM(config).double().train()


def tokens_of(batch):
    return torch.randint(31, (batch, TIME), generator=torch.Generator().manual_seed(1))


def trained_on_rank(group, how, packed):
    """A step's loss and gradients; 2 x 2 ranks, or 4 along the sequence where it is packed in a batch of one."""
    shape = (1, 4) if packed else (2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "context"))
    everyone = mesh["data", "context"]._flatten("everyone")
    model = small_model()
    if how == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_context_group(model, mesh["context"])
    if how == "fsdp":
        for block in model.model.layers:
            fully_shard(block, mesh=everyone)
        fully_shard(model, mesh=everyone)
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model, process_group=everyone.get_group())
    data, context = mesh["data"].get_local_rank(), mesh["context"].get_local_rank()
    batch = tokens_of(1 if packed else 4).chunk(shape[0], 0)[data]
    mine = batch.tensor_split(shape[1], 1)[context]
    cu_seqlens = torch.tensor(STARTS) if packed else None
    loss = wrapped(input_ids=mine, labels=mine, cu_seqlens=cu_seqlens).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if how == "fsdp" else gradient
    return data, loss.item(), gradients


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "checkpointing"])
def test_a_language_model_on_a_mesh(four, how, packed):
    """Loss and gradients of all parameters are those of one process with the whole batch; also where layers are
    computed again, their exchanges with them."""
    model, tokens = small_model(), tokens_of(1 if packed else 4)
    loss = model(input_ids=tokens, labels=tokens, cu_seqlens=torch.tensor(STARTS) if packed else None).loss
    loss.backward()
    found = four.run(4, trained_on_rank, how, packed)
    losses = {data: value for data, value, _ in found}
    assert abs(sum(losses.values()) / len(losses) - loss.item()) < 1e-6  # Transformers takes the loss in float32
    for _, _, gradients in found:
        for name, parameter in model.named_parameters():
            assert_close(gradients[name], parameter.grad, 1e-6, name)


def heads_on_rank(group):
    """Ranks 0 and 1 have the first key head and its value heads, 2 and 3 the second; each pair halves the sequence."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tensor", "context"))
    inputs = make_inputs("gated_delta_rule", Sizes(1, TIME, 2, 4, 4, 3))
    mine = {}
    for name, tensor in inputs.items():
        heads = tensor.chunk(2, 2)[mesh["tensor"].get_local_rank()]
        mine[name] = heads.tensor_split(2, 1)[mesh["context"].get_local_rank()].clone().requires_grad_()
    output, _ = functional.gated_delta_rule(**mine, aggregate="distributed", context_group=mesh["context"])
    whole = weights(torch.empty(1, TIME, 4, 3, dtype=torch.float64), 1)
    ours = whole.chunk(2, 2)[mesh["tensor"].get_local_rank()].tensor_split(2, 1)[mesh["context"].get_local_rank()]
    (output * ours).sum().backward()
    return {"output": output.detach(), **{name: tensor.grad for name, tensor in mine.items()}}


def test_heads_and_sequence_over_ranks(four):
    inputs = {k: x.requires_grad_() for k, x in make_inputs("gated_delta_rule", Sizes(1, TIME, 2, 4, 4, 3)).items()}
    output, _ = functional.gated_delta_rule(**inputs)
    (output * weights(output, 1)).sum().backward()
    found = four.run(4, heads_on_rank)
    for name in found[0]:
        rows = [torch.cat([found[2 * head + part][name] for part in range(2)], 1) for head in range(2)]
        whole = output if name == "output" else inputs[name].grad
        assert_close(torch.cat(rows, 2), whole, 1e-10, name)


def wide_mesh_on_rank(group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    functional.gated_delta_rule(**make_inputs("gated_delta_rule"), aggregate="distributed", context_group=mesh)


def test_a_mesh_has_one_dimension(four):
    for answer, _ in four.answers(4, wide_mesh_on_rank):
        assert "context_group: got a DeviceMesh of 2 dimensions, expected one" in answer
    assert not dist.is_initialized()
