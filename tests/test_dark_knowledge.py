from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_lab

from mnist_lab.errors import UserError
from mnist_lab.studies.dark_knowledge import (
    PAPER,
    DarkKnowledge,
    Errors,
    best_bias,
    format_dark_knowledge,
    load_dark_knowledge,
    paper_rows,
    raise_bias,
    recipes_of,
    run_seed,
    save_dark_knowledge,
)
from mnist_lab.training import Recipe, fit

pytestmark = pytest.mark.slow

RECIPE = Recipe(epochs=2, batch_size=32, learning_rate=3e-3)
SHORT = Recipe(epochs=1, batch_size=32)


def test_bias_is_the_smallest_of_the_best() -> None:
    logits = np.zeros((4, 10), np.float32)
    logits[:, 0] = [1.05, 2.05, 5.05, 8.05]
    labels = np.array([3, 3, 0, 0])
    assert best_bias(logits, labels) == pytest.approx(2.1)
    assert raise_bias(logits, 2.1).argmax(axis=1).tolist() == labels.tolist()


def test_student_sees_no_three_and_finished_models_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, int, bool]] = []

    def spy(model, data, *args, **kwargs):  # type: ignore[no-untyped-def]
        has_threes = bool((data.train.labels == 3).any())
        trained.append((kwargs["name"].split()[0], model.config.widths[0], has_threes))
        return fit(model, data, *args, **kwargs)

    monkeypatch.setattr("mnist_lab.experiments.technique.fit", spy)
    lab, rows = make_lab(tmp_path), paper_rows(RECIPE, RECIPE)
    run = run_seed(lab, rows, 0)
    assert trained == [
        ("teacher", 1200, True),
        ("labels", 800, True),
        ("distilled", 800, True),
        ("distilled-without-3", 800, False),
    ]
    assert run.errors["bias corrected"].threes <= run.errors["distilled-without-3"].threes
    assert all(errors.threes <= errors.all_digits <= run.num_images for errors in run.errors.values())
    assert run.num_threes == int((lab.test.labels == 3).sum())
    assert run_seed(lab, rows, 0) == run
    assert len(trained) == 4
    run_seed(lab, paper_rows(SHORT, RECIPE), 0)
    assert [name for name, *_ in trained[4:]] == ["teacher", "distilled", "distilled-without-3"]  # its teacher changed
    text = format_dark_knowledge([run])
    assert "206" in text
    assert str(run.errors["labels"].all_digits) in text
    assert torch.equal(lab.dataset.train.labels.unique(), torch.arange(10))


def test_file_is_read_where_it_is_of_this_data_set_and_these_recipes(tmp_path: Path) -> None:
    path, recipes = tmp_path / "dark_knowledge.json", recipes_of(paper_rows())
    errors = dict.fromkeys(PAPER, Errors(3, 1))
    run = DarkKnowledge(0, "mnist", recipes, errors, bias=0.1, num_images=100, num_threes=10)
    runs = [run, replace(run, seed=1)]
    save_dark_knowledge(path, runs)
    assert load_dark_knowledge(path, "mnist") == runs
    with pytest.raises(UserError, match="not of kmnist"):
        load_dark_knowledge(path, "kmnist")
    others = [[], [run, run], [replace(run, errors={})], [replace(run, recipes=recipes_of(paper_rows(SHORT)))]]
    for other in others:
        save_dark_knowledge(path, other)
        with pytest.raises(UserError, match=r"dark_knowledge.json is broken"):
            load_dark_knowledge(path, "mnist")
    save_dark_knowledge(path, runs)
    path.write_text(path.read_text().replace('"num_threes": 10', '"num_threes": 11'))
    with pytest.raises(UserError, match=r"dark_knowledge.json is broken"):
        load_dark_knowledge(path, "mnist")
