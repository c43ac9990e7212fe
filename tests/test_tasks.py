"""Labels are right: each task's answers against those of plain Python, one sequence at a time."""

from __future__ import annotations

import operator

import pytest
import torch

from parallelflow.tasks import IGNORED, TASKS, alternating, make_task, symmetric


def draw(name: str, count: int = 20, length: int = 31, seed: int = 0):
    return make_task(name).draw(count, length, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TASKS)
def test_shapes_ranges_and_seeds(name):
    task, (tokens, labels) = make_task(name), draw(name)
    assert tokens.shape == labels.shape == (20, 31)
    assert tokens.dtype == labels.dtype == torch.int64
    asked = labels != IGNORED
    assert asked.any(1).all()
    assert labels[asked].min() >= 0 and labels[asked].max() < task.classes
    assert tokens.min() >= 0 and tokens.max() < task.vocabulary
    assert torch.equal(draw(name).tokens, tokens) and not torch.equal(draw(name, seed=1).tokens, tokens)
    with pytest.raises(ValueError, match="length: got 0"):
        task.draw(1, 0)
    with pytest.raises(TypeError, match=r"generator: got int, expected a torch\.Generator or None"):
        task.draw(1, 5, 0)


def test_parity_counts_ones():
    tokens, labels = draw("parity")
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert answers == [sum(row[: t + 1]) % 2 for t in range(len(row))]


def test_even_pairs_counts_changes():
    tokens, labels = draw("even_pairs")
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        changes = 0
        for position, answer in enumerate(answers):
            changes += position > 0 and row[position] != row[position - 1]
            assert answer == changes % 2


def test_cycle_navigation_walks():
    tokens, labels = draw("cycle_navigation")
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        place = 0
        for token, answer in zip(row, answers, strict=True):
            place = {0: place, 1: (place + 1) % 5, 2: (place + 4) % 5}[token]
            assert answer == place


@pytest.mark.parametrize("name", ["S3", "S4", "A5", "S5"])
def test_words_move_things_about(name):
    """The permutations are applied, one after another, to things in a row."""
    elements = make_task(name).group.elements
    tokens, labels = draw(name, count=3)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        where = list(range(len(elements[0])))
        for token, answer in zip(row, answers, strict=True):
            where = [elements[token][place] for place in where]
            assert elements[answer] == tuple(where)


def test_groups_are_groups():
    for group, size in ((symmetric(3), 6), (symmetric(4), 24), (alternating(5), 60), (symmetric(5), 120)):
        product, everything = group.product, torch.arange(size)
        assert torch.equal(product[0], everything) and torch.equal(product[:, 0], everything)
        assert (product.sort(0).values == everything[:, None]).all() and (product.sort(1).values == everything).all()
        a, b, c = torch.randint(size, (3, 200), generator=torch.Generator().manual_seed(0))
        assert torch.equal(product[product[a, b], c], product[a, product[b, c]])


def test_modular_arithmetic_is_pythons():
    tokens, labels = draw("modular_arithmetic")
    operations = {5: operator.add, 6: operator.sub, 7: operator.mul}
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        result = row[0]
        assert answers[0] == result
        for sign, digit, empty, answer in zip(row[1::2], row[2::2], answers[1::2], answers[2::2], strict=True):
            result = operations[sign](result, digit) % 5
            assert answer == result and empty == IGNORED


@pytest.mark.parametrize("length", [3, 31, 200])
def test_recall_finds_what_was_said(length):
    task = make_task("associative_recall")
    tokens, labels = draw("associative_recall", length=length)
    pairs = min(length // 3, 32)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        said = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(said) == pairs and sorted(row[-pairs:]) == sorted(said)
        assert answers == [IGNORED] * (length - pairs) + [said[key] - task.keys for key in row[-pairs:]]
    with pytest.raises(ValueError, match="length: got 2"):
        task.draw(1, 2)


def test_an_unknown_task():
    with pytest.raises(ValueError, match=r"task: got 's3', expected one of 'parity'"):
        make_task("s3")
