import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mnist_lab import dark_knowledge, training
from mnist_lab.data import Dataset
from mnist_lab.training import Recipe

RECIPE = Recipe(epochs=10, batch_size=32, learning_rate=3e-3)


def test_bias_is_the_smallest_of_the_best() -> None:
    logits = np.zeros((4, 10), np.float32)
    logits[:, 0] = [1.05, 2.05, 5.05, 8.05]
    labels = np.array([3, 3, 0, 0])
    assert dark_knowledge.best_bias(logits, labels) == pytest.approx(2.1)
    assert dark_knowledge.raise_bias(logits, 2.1).argmax(axis=1).tolist() == labels.tolist()


def test_student_sees_no_three_and_finished_models_are_kept(
    toy_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int, bool]] = []
    fit = training.fit

    def spy(model, data, *args, **kwargs):  # type: ignore[no-untyped-def]
        has_threes = bool((data.train.labels == 3).any())
        trained.append((kwargs["name"].split()[0], model.config.widths[0], has_threes))
        return fit(model, data, *args, **kwargs)

    monkeypatch.setattr(dark_knowledge, "fit", spy)
    run = dark_knowledge.run_seed(toy_dataset, tmp_path, 0, teacher_recipe=RECIPE, student_recipe=RECIPE)
    assert trained == [
        ("teacher", 1200, True),
        ("labels", 800, True),
        ("distilled", 800, True),
        ("distilled-without-3", 800, False),
    ]
    assert run.errors["bias corrected"].threes <= run.errors["distilled-without-3"].threes
    assert all(errors.threes <= errors.all_digits <= run.num_images for errors in run.errors.values())
    assert run.num_threes == int((toy_dataset.load_test().labels == 3).sum())
    again = dark_knowledge.run_seed(toy_dataset, tmp_path, 0, teacher_recipe=RECIPE, student_recipe=RECIPE)
    assert again == run
    assert len(trained) == 4
    dark_knowledge.run_seed(toy_dataset, tmp_path, 0, teacher_recipe=replace(RECIPE, epochs=1), student_recipe=RECIPE)
    assert [name for name, *_ in trained[4:]] == ["teacher", "distilled", "distilled-without-3"]  # its teacher changed
    text = dark_knowledge.format_dark_knowledge([run])
    assert "206" in text
    assert str(run.errors["labels"].all_digits) in text
    assert torch.equal(toy_dataset.train.labels.unique(), torch.arange(10))
    assert json.dumps(run.errors["teacher"]) == json.dumps(list(run.errors["teacher"]))
