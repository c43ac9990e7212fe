"""The command line: readable help, clear errors, and a demonstration whose parts do what they say."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch

from parallelflow import functional

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from parallelflow.cli import app
from parallelflow.cli.demo import agreement, plots, recurrences, run, state_tracking, training
from parallelflow.cli.demo.corpus import LEAST_BYTES, read_corpus
from parallelflow.cli.demo.language_model import ByteLanguageModel

ROOT = Path(__file__).parents[1]


def invoke(*arguments: object) -> tuple[int, str]:
    """The exit code and the words of what a command says: without the frame that it is printed in."""
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), "demo"), (("demo",), "--data"), (("doctor",), "recurrence"), (("reproduce",), "--quick")],
    ids=["parallelflow", "demo", "doctor", "reproduce"],
)
def test_help(arguments, expected):
    code, text = invoke(*arguments, "--help")
    assert code == 0
    assert expected in text


def test_doctor_checks_the_engine():
    code, text = invoke("doctor")
    assert code == 0
    assert torch.__version__ in text
    assert "passed" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "does not exist"), (b"", "is empty"), (b"short", f"at least {LEAST_BYTES:,} bytes")],
    ids=["missing", "empty", "short"],
)
def test_data_that_cannot_be_used(tmp_path, content, expected):
    file = tmp_path / "data"
    if content is not None:
        file.write_bytes(content)
    code, text = invoke("demo", "--data", file, "--output", tmp_path / "out")
    assert code == 2
    assert "--data" in text
    with pytest.raises(ValueError, match=expected):
        read_corpus(file)
    assert not (tmp_path / "out").exists()


def test_data_that_is_a_folder(tmp_path):
    with pytest.raises(ValueError, match="which is a folder"):
        read_corpus(tmp_path)


def test_data_for_a_part_that_is_left_out(tmp_path):
    code, text = invoke("demo", "--only", "models", "--data", tmp_path / "file")
    assert code == 2
    assert "--only" in text


def test_output_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.touch()
    code, text = invoke("demo", "--output", file)
    assert code == 2
    assert "--output" in text


def test_unknown_options():
    assert invoke("demo", "--dta", "x")[0] == 2
    assert invoke("demo", "--only", "everything")[0] == 2


def test_every_byte_is_data(tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * 64)
    corpus = read_corpus(file)
    assert len(corpus.training) + len(corpus.held_out) == 256 * 64
    tokens, targets = corpus.batch(3, 100, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (3, 100)
    assert torch.equal((tokens + 1) % 256, targets)


def test_the_standard_library_is_data():
    corpus = read_corpus()
    assert len(corpus.training) > 10**6
    assert bytes(corpus.training[: 10**6].tolist()).count(b"def ") > 1000


def test_every_model_has_a_recurrence():
    own = [x for x in vars(functional).values() if inspect.isfunction(x) and x.__module__ == functional.__name__]
    assert {x.__name__ for x in recurrences.MODELS} == {x.__name__ for x in own if not x.__name__.startswith("_")}


@pytest.mark.parametrize("model", [x.__name__ for x in recurrences.MODELS])
def test_models_agree_with_their_recurrence(model, monkeypatch):
    monkeypatch.setattr(agreement, "EXACT", agreement.EXACT._replace(length=70))
    assert max(agreement.agreement_errors(model)) <= agreement.AGREEMENT


def test_a_disagreement_is_a_failure(tmp_path, monkeypatch):
    figures = [agreement.ModelFigures("delta_rule", 1e-3, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)]
    monkeypatch.setattr(agreement, "measure_models", lambda: iter(figures))
    monkeypatch.setattr(agreement, "measure_lengths", lambda: iter([agreement.LengthFigures(64, 1.0, 2.0, 3.0)]))
    with pytest.raises(run.DemoFailed, match="delta_rule"):
        run.run_demo(None, tmp_path, parts=["models"])
    assert json.loads((tmp_path / "results.json").read_text())["models"][0]["output_error"] == 1e-3
    assert (tmp_path / "time_against_length.png").stat().st_size > 10**4
    assert "delta_rule" in (tmp_path / "models.md").read_text()


def test_bytes_one_by_one_are_bytes_at_once():
    torch.manual_seed(0)
    model = ByteLanguageModel(width=32, depth=2, heads=2).double()
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.randint(256, (2, 100))
    expected = model(tokens)
    logits, memories = model.read(tokens[:, :70])
    torch.testing.assert_close(logits, expected[:, :70])
    size = sum(x.nbytes for memory in memories for x in memory)
    for position in range(70, 100):
        logits, memories = model.read(tokens[:, position : position + 1], memories)
        torch.testing.assert_close(logits[:, 0], expected[:, position])
    assert sum(x.nbytes for memory in memories for x in memory) == size


def test_binary_samples_leave_the_terminal_alone():
    assert run._printable("a\x1b[31m\x00b\n\tπ") == "a·[31m·b\n\tπ"


def test_the_language_model_learns_and_writes(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"the state decays and takes a few rows. " * 400)
    corpus = read_corpus(file)
    recipe = training.Recipe(width=32, depth=1, heads=2, length=64, steps=40, batch=4, prompt=8, generated=16)
    model, figures = training.train(corpus, recipe)
    assert figures.steps == len(figures.training_loss) == 40
    assert figures.held_out_loss[-1] < figures.held_out_loss[0] - 2
    training.speak(model, corpus, recipe, figures)
    assert len(figures.sample) == 16
    assert figures.step_agreement < 1e-4
    plots.plot_loss(figures, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10**4


def test_products_of_permutations():
    tokens, products = state_tracking.sequences(4, 20, torch.Generator().manual_seed(0))
    for row, answers in zip(tokens.tolist(), products.tolist(), strict=True):
        arrangement = (0, 1, 2)
        for token, answer in zip(row, answers, strict=True):
            arrangement = tuple(state_tracking.PERMUTATIONS[token][i] for i in arrangement)
            assert state_tracking.PERMUTATIONS[answer] == arrangement


def test_contenders_are_equals(tmp_path):
    recipe = state_tracking.Recipe(steps=2, test_sequences=8, length=8)
    results = [state_tracking.train(x, recipe) for x in state_tracking.CONTENDERS]
    sizes = [x.parameters for x in results]
    assert max(sizes) <= 1.05 * min(sizes)
    assert sizes[0] == min(sizes), "two Householders get no more parameters than one"
    plots.plot_tracking(results, recipe.length, tmp_path / "tracking.png")
    assert (tmp_path / "tracking.png").stat().st_size > 10**4


def test_the_examples_import(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    new_model = importlib.import_module("new_model")
    torch.manual_seed(0)
    losses = list(new_model.train(new_model.Memory(), steps=80))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
