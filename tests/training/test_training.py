"""A training that is killed, damaged or fed anything ends as if nothing had happened, or says what is wrong."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from safetensors.torch import load_file
from typer.testing import CliRunner

from parallelflow.cli import app
from parallelflow.training import (
    Bytes,
    CheckpointError,
    Recipe,
    Tokenizer,
    checkpoint,
    latest,
    loop,
    open_text,
    train,
)
from tests.training import child

ROOT = Path(__file__).parents[2]


def recipe(**changed) -> Recipe:
    return Recipe.of(child.RECIPE | changed)


@pytest.fixture
def data(tmp_path) -> Path:
    """More than one file, one of them not text at all."""
    folder = tmp_path / "data"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_text("the state decays, and every token writes a row. " * 20, encoding="utf-8")
    (folder / "below" / "b.bin").write_bytes(random.Random(0).randbytes(2000))
    (folder / "c").write_bytes(b"")
    (folder / ".hidden").write_bytes(b"not this")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(folder / "checkpoints").folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def spoil(file: Path) -> None:
    """Cut in the middle, as a full disk would."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.slow
def test_killed_twenty_times_ends_with_the_same_bits(tmp_path, data):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.training.child"])  # imports once, forks for every start
    long = child.RECIPE | {"steps": 300, "checkpoint_every": 3, "evaluate_every": 100}

    def start(folder: Path):
        started = processes.Event()
        process = processes.Process(target=child.run, args=(long, data, folder, started))
        process.start()
        assert started.wait(60)
        return process

    whole = start(tmp_path / "whole")
    before = time.perf_counter()
    whole.join()
    seconds = time.perf_counter() - before
    assert whole.exitcode == 0

    chance, kills, steps = random.Random(1), 0, []
    while kills < 20:
        process = start(tmp_path / "killed")
        time.sleep(chance.uniform(0, 1.6 * seconds / 20))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it had ended before it was killed: train longer"
        kills += 1
        found = sorted((tmp_path / "killed" / "checkpoints").glob("step-*"))
        steps.append(latest(tmp_path / "killed" / "checkpoints").step if found else 0)
    assert len(set(steps)) > 3, f"the kills were not at different times: {steps}"
    last = start(tmp_path / "killed")
    last.join()
    assert last.exitcode == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 300


class Stopped(Exception):
    """In place of a kill."""


def stopped_at(step: int):
    def report(entry):
        if entry["step"] == step:
            raise Stopped

    return report


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_going_on_needs_optimiser_schedule_and_data(tmp_path, data, precision):
    settings = recipe(precision=precision, model=child.RECIPE["model"] | {"tie_word_embeddings": True})
    text = open_text(data, Bytes(), settings, tmp_path)
    train(settings, text, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(settings, text, tmp_path / "cut", report=stopped_at(12))
    with pytest.raises(ValueError, match="--resume"):
        train(settings, text, tmp_path / "cut")
    train(settings, text, tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("file", [*checkpoint.FILES, "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, data, file, damage):
    text = open_text(data, Bytes(), recipe(), tmp_path)
    with pytest.raises(Stopped):
        train(recipe(), text, tmp_path / "run", report=stopped_at(12))
    newest, before = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    assert (newest.name, before.name) == ("step-00000010", "step-00000005")
    if damage == "truncated":
        spoil(newest / file)
    elif damage == "missing":
        (newest / file).unlink()
    else:
        (newest / file).write_text('{"format": "another"}', encoding="utf-8")
    said = []
    assert latest(tmp_path / "run" / "checkpoints", said.append).step == 5
    assert len(said) == 1 and str(newest) in said[0]
    train(recipe(), text, tmp_path / "whole")
    train(recipe(), text, tmp_path / "run", resume=True, warn=said.append)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    for place in (tmp_path / "run" / "checkpoints").iterdir():
        spoil(place / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000020: model.safetensors is truncated.*step-00000015"):
        train(recipe(), text, tmp_path / "run", resume=True)


def test_a_full_disk_leaves_what_was_there(tmp_path, data, monkeypatch):
    """The error says what could not be written; nothing half is left, and the training goes on from the one before."""
    text = open_text(data, Bytes(), recipe(), tmp_path)
    train(recipe(), text, tmp_path / "whole")
    write = checkpoint.save_file

    def full(tensors, file):
        if "00000015" in str(file):
            file.write_bytes(b"half")
            raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")
        write(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"checkpoint: .*step-00000015 cannot be written: .*No space left on device"):
        train(recipe(), text, tmp_path / "run")
    there = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert there == ["step-00000005", "step-00000010"]
    monkeypatch.undo()
    train(recipe(), text, tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_checkpoint_of_another_training(tmp_path, data):
    text = open_text(data, Bytes(), recipe(), tmp_path)
    train(recipe(), text, tmp_path / "run")
    with pytest.raises(ValueError, match=r"learning_rate: got 0.5, expected 0.003 as in"):
        train(recipe(learning_rate=0.5), text, tmp_path / "run", resume=True)
    other = text._replace(tokens=type("Other", (Bytes,), {"name": "other"})())
    with pytest.raises(ValueError, match="tokenizer: got other tokens"):
        train(recipe(), other, tmp_path / "run", resume=True)


def test_accumulation_is_a_larger_batch(tmp_path, data):
    """One step of two batches is the mean of both: the same gradient to rounding."""
    text = open_text(data, Bytes(), recipe(), tmp_path)
    batches = [text.batch(recipe(), stream) for stream in (0, 1)]
    train(recipe(steps=1, clip=1e9), text, tmp_path / "parts")
    settings = recipe(steps=1, batch=4, accumulation=1, clip=1e9)

    class Both(type(text)):
        def batch(self, settings, stream, held_out=False):
            return torch.cat(batches) if not held_out else text.batch(recipe(), stream, held_out)

    train(settings, Both(*text), tmp_path / "both")
    entries = [json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("parts", "both")]
    assert entries[0]["gradient_norm"] == pytest.approx(entries[1]["gradient_norm"], rel=1e-5)
    assert entries[0]["loss"] == pytest.approx(entries[1]["loss"], rel=1e-6)


def test_the_schedule():
    settings = recipe(steps=105, warmup=5, learning_rate=1.0, final_learning_rate=0.1)
    rates = [settings.rate(step) for step in range(106)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[55] == pytest.approx(0.55) and rates[105] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))


def test_files_are_read_as_one(data, tmp_path):
    text = open_text(data, Bytes(), recipe(), tmp_path)
    whole = b"".join((data / name).read_bytes() for name in ("a.txt", "below/b.bin", "c"))
    assert text.total == len(whole)
    for start, count in ((0, 10), (950, 40), (0, len(whole)), (len(whole) - 3, 3), (959, 2)):
        assert bytes(text.read(start, count).tolist()) == whole[start : start + count]
    held_out = text.batch(recipe(), 3, held_out=True)
    assert held_out.shape == (2, 17)
    kept = whole[int(0.9 * len(whole)) :]
    assert all(bytes(row.tolist()) in kept for row in held_out)
    assert not torch.equal(text.batch(recipe(), 0), text.batch(recipe(), 1))
    assert not torch.equal(text.batch(recipe(), 0), text.batch(recipe(seed=1), 0))


def test_a_huge_file_is_not_loaded(tmp_path):
    huge = tmp_path / "huge"
    with huge.open("wb") as stream:
        stream.truncate(2**43)  # 8 TiB that no disk and no memory here has
        stream.seek(2**43 - 4)
        stream.write(b"tail")
    text = open_text(huge, Bytes(), recipe(), tmp_path)
    assert bytes(text.read(2**43 - 4, 4).tolist()) == b"tail"
    assert text.batch(recipe(), 0).shape == (2, 17)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "does not exist"), (b"", "is empty"), (b"short", "has 5 tokens"), ({}, "is empty")],
    ids=["missing", "empty", "short", "empty folder"],
)
def test_data_that_cannot_be_used(tmp_path, content, expected):
    place = tmp_path / "data"
    if content == {}:
        place.mkdir()
    elif content is not None:
        place.write_bytes(content)
    with pytest.raises(ValueError, match=f"data: .*{expected}"):
        open_text(place, Bytes(), recipe(), tmp_path)


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(["the state decays, and every token writes a row. "] * 3, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokens_of_a_tokenizer_file(tmp_path, data, tokenizer):
    tokens = Tokenizer(tokenizer)
    text = open_text(data / "a.txt", tokens, recipe(), tmp_path / "tokens")
    expected = tokens.encode((data / "a.txt").read_text())
    assert text.read(0, text.total).tolist() == expected
    assert max(expected) >= 256 or len(expected) < 960
    say = tokens.decoder()
    assert "".join(say(token) for token in tokens.encode("a row é 漢")) == "a row é 漢"
    (made,) = (tmp_path / "tokens").iterdir()
    again = made.stat().st_mtime_ns
    open_text(data / "a.txt", tokens, recipe(), tmp_path / "tokens")
    assert made.stat().st_mtime_ns == again, "tokens are made once"
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        open_text(data, tokens, recipe(), tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"tokenizer: .* cannot be read"):
        Tokenizer(data / "a.txt")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"lenght": 3}, "lenght: unknown key; did you mean 'length'"),
        ({"batch": 0}, "batch: got 0, expected at least 1"),
        ({"steps": 1.5}, "steps: got 1.5, expected a whole number"),
        ({"learning_rate": "1e-3"}, "learning_rate: got '1e-3', expected a number"),
        ({"clip": float("nan")}, "clip: got nan, expected a finite number"),
        ({"held_out": 1}, "held_out: got 1, expected a share"),
        ({"precision": "half"}, "precision: got 'half', expected one of"),
        ({"keep": 1}, "keep: got 1, expected at least 2"),
        ({"model": {"layers": "mamba2"}}, "model.layers: got 'mamba2', expected a list of names"),
        ({"model": {"layer_options": {"gated_delta_net": {"forget_gate": "no"}}}}, "model.forget_gate: got 'no'"),
        ({"model": {"layers": ["mamba3"]}}, "model.layers: got 'mamba3'.*did you mean 'mamba2'"),
        ({"model": {"vocab_size": 3}}, "model.vocab_size"),
        ({"model": 3}, "model: got 3"),
    ],
)
def test_an_error_names_the_key(changed, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        recipe(**changed)


@pytest.mark.parametrize("name", ["small.yaml", "medium.yaml"])
def test_the_examples_are_recipes(name):
    assert Recipe.load(ROOT / "examples" / name).steps > 0


def test_paths_may_be_text(tmp_path, data):
    """As they are written in a notebook."""
    text = open_text(str(data), Bytes(), recipe(), str(tmp_path / "tokens"))
    train(recipe(steps=1), text, str(tmp_path / "run"))
    assert latest(str(tmp_path / "run" / "checkpoints")).step == 1


def test_what_a_training_is_not(tmp_path, data):
    text = open_text(data, Bytes(), recipe(), tmp_path)
    cases = [
        (lambda: train({"steps": 1}, text, tmp_path), TypeError, "recipe: got dict, expected a Recipe"),
        (lambda: train(recipe(), data, tmp_path), TypeError, "text: got .*Path, expected what open_text returns"),
        (
            lambda: train(recipe(), text, tmp_path, device="moon"),
            ValueError,
            "device: got 'moon', expected one that is",
        ),
        (lambda: open_text(data, "bytes", recipe(), tmp_path), TypeError, r"tokens: got str, expected Bytes\(\)"),
        (lambda: open_text(data, Bytes(), {}, tmp_path), TypeError, "recipe: got dict, expected a Recipe"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_a_loss_that_is_not_finite(tmp_path, data, monkeypatch):
    original = loop._loss
    monkeypatch.setattr(loop, "_loss", lambda *arguments: original(*arguments) * float("inf"))
    text = open_text(data, Bytes(), recipe(), tmp_path)
    with pytest.raises(FloatingPointError, match="step 1: the loss is inf"):
        train(recipe(), text, tmp_path / "run")


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_train_and_generate(tmp_path, data, tokenizer, with_tokenizer):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(child.RECIPE), encoding="utf-8")  # JSON is YAML
    options = ["--data", data / "a.txt", "--config", config, "--output", tmp_path / "run", "--device", "cpu"]
    options += ["--tokenizer", tokenizer] if with_tokenizer else []
    code, said = invoke("train", *options)
    assert code == 0, said
    assert "held out" in said and "tokens/s" in said
    assert {"checkpoints", "log.jsonl", "loss.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    code, said = invoke("train", *options)
    assert code == 2 and "--resume" in said
    code, said = invoke("train", *options, "--resume")
    assert code == 0 and "nothing is left to do" in said
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    code, said = invoke("train", *options, "--resume")
    assert code == 0 and "going on after step 15" in said
    speak = ["generate", tmp_path / "run", "--prompt", "the state", "--tokens", 12, "--device", "cpu"]
    code, said = invoke(*speak)
    assert code == 0 and said.startswith("the state") and len(said) > 12
    assert invoke(*speak)[1] == said, "the same seed says the same"
    assert invoke(*speak, "--seed", 1)[1] != said
    assert invoke(*speak, "--temperature", "1e-40")[1] == invoke(*speak, "--temperature", 0)[1]
    code, said = invoke(*speak, "--temperature", "inf")
    assert code == 2 and "temperature: got inf" in said
    code, said = invoke("generate", tmp_path / "elsewhere")
    assert code == 2 and "has none" in said
    code, said = invoke("train", *options[:2], "--config", data / "a.txt", "--output", tmp_path / "other")
    assert code == 2 and "config: " in said
    code, said = invoke("train", *options[:4], "--output", config / "below")
    assert code == 2 and "output: got" in said


def test_an_interrupted_training_says_how_to_go_on(tmp_path, data, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("parallelflow.training.train", interrupted)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(child.RECIPE), encoding="utf-8")
    code, said = invoke("train", "--data", data, "--config", config, "--output", tmp_path / "run", "--device", "cpu")
    assert code == 130 and "--resume goes on" in said


def test_bench_and_doctor_name_a_backend_for_every_model():
    from parallelflow.cli.demo.recurrences import MODELS

    for command in (("doctor",), ("bench", "--length", "16", "--heads", "1", "--head-dim", "8", "--repeats", "1")):
        code, said = invoke(*command)
        assert code == 0
        rows = {line.split()[0]: line.split()[1] for line in said.splitlines() if len(line.split()) > 1}
        assert all(rows[model.__name__] in ("torch", "cpu", "triton", "hopper") for model in MODELS)
