"""Training: checkpointing, compilation, autocast, Trainer, and several processes give the plain gradients."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from parallelflow.nn import LAYERS
from tests.models.small import small_config, small_model, tokens

ROOT = Path(__file__).parents[2]
MIXED = ("gated_delta_net", "softmax_attention", "rwkv7", "mamba2", "rwkv7")


def gradients(model: torch.nn.Module, text: torch.Tensor, **options: object) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(text, labels=text, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= tolerance * value.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("layer", LAYERS)
def test_every_parameter_has_a_gradient(layer):
    model = small_model(layer, layer).train()
    found = gradients(model, tokens(2, 13))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        assert gradient.isfinite().all() and gradient.any(), name


def test_gradient_checkpointing():
    model, text = small_model(*MIXED).train(), tokens(2, 11)
    expected = gradients(model, text)
    model.gradient_checkpointing_enable()
    calls = []
    hook = model.model.layers[0].attn.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients(model, text)
    hook.remove()
    assert len(calls) == 2, "the block was not computed again"
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant: got True"):
        model(text)


def test_the_loss_of_a_batch_is_of_its_sequences():
    """Padded or packed: the sequences' losses, weighted by the tokens that they predict."""
    model, text = small_model(*MIXED).double().train(), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    labels = text.masked_fill(mask == 0, -100)
    together = model(text * mask, attention_mask=mask, labels=labels).loss
    first, second = (model(x, labels=x).loss for x in (text[:1], text[1:, 4:]))
    line = torch.cat([text[:1], text[1:, 4:]], 1)
    packed = model(line, cu_seqlens=torch.tensor([0, 9, 14]), labels=line).loss
    expected = (first * 8 + second * 4) / 12
    torch.testing.assert_close(together, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=0)


def test_autocast():
    """Under autocast a step is near the float32 one, and its gradients are finite float32."""
    model, text = small_model(*MIXED, "kimi_delta_attention", "delta_product").train(), tokens(2, 11)
    loss = model(text, labels=text).loss
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(text, labels=text).loss
    narrow.backward()
    assert abs(narrow - loss) < 0.05 * loss
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
def test_compiled():
    model, text = small_model("gated_delta_net", "softmax_attention").train(), tokens(2, 70)
    expected, logits = gradients(model, text), model(text).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    torch.testing.assert_close(compiled(text, use_cache=False).logits, logits, rtol=1e-5, atol=1e-4)
    compiled(text, labels=text, use_cache=False).loss.backward()
    assert_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected, 1e-4)


@pytest.mark.slow
def test_trainer(tmp_path):
    """The Trainer trains, evaluates, saves and goes on, on padded batches, without special code."""
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 12, (n,), generator=generator).repeat(3).tolist() for n in (4, 5, 3, 6) * 8]

    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        ids = torch.zeros(len(items), width, dtype=torch.long)
        for row, item in enumerate(items):
            ids[row, width - len(item["input_ids"]) :] = torch.tensor(item["input_ids"])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=6,
        use_cpu=True,
        report_to=[],
        seed=0,
    )
    data = [{"input_ids": row} for row in rows]

    def trainer() -> transformers.Trainer:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(small_config("gated_delta_net", "softmax_attention"))
        return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], data_collator=collate)

    whole = trainer()
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0], losses
    assert whole.evaluate()["eval_loss"] < losses[0]
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def processes(program: str) -> None:
    """Runs this file's ``program`` in two processes that talk over gloo."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, program],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_data_parallel_gradients():
    processes("data_parallel")


@pytest.mark.slow
def test_fully_sharded_gradients():
    processes("fully_sharded")


def data_parallel() -> None:
    """Half the batch on each process, by ``DistributedDataParallel``: the whole batch's gradients."""
    model, text = small_model(*MIXED).train(), tokens(4, 11)
    expected = gradients(copy.deepcopy(model), text)
    rank = torch.distributed.get_rank()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(text[2 * rank : 2 * rank + 2], labels=text[2 * rank : 2 * rank + 2]).loss.backward()
    assert_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected, 1e-4)


def fully_sharded() -> None:
    """The same by ``fully_shard`` (FSDP2): every parameter in two halves."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, text = small_model(*MIXED).train(), tokens(4, 11)
    expected = gradients(copy.deepcopy(model), text)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rank = torch.distributed.get_rank()
    model(text[2 * rank : 2 * rank + 2], labels=text[2 * rank : 2 * rank + 2]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.to_local().shape[0] <= -(-parameter.shape[0] // 2), name
    whole = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert_gradients(whole, expected, 1e-4)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    {"data_parallel": data_parallel, "fully_sharded": fully_sharded}[sys.argv[1]]()
    torch.distributed.destroy_process_group()
