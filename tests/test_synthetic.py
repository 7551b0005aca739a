"""Images that are made, and students that know only what a teacher takes them for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_dataset, make_lab
from torch import Tensor

from mnist_lab.compress.distill import Distil
from mnist_lab.compress.synthetic import (
    SYNTHETIC,
    DistilOnImages,
    Generator,
    Images,
    ascended,
    classes_of,
    generated,
    make_images,
    mixed,
    noise,
    taken,
    train_generator,
)
from mnist_lab.compress.train import TrainFFN
from mnist_lab.data import Augmentation, Dataset, Split
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import ensure_weights
from mnist_lab.experiments.resume import keepers
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import FFN, MOE, student, student_on_images
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.technique import Work
from mnist_lab.models import PRESETS
from mnist_lab.models.checkpoints import read_metadata
from mnist_lab.training import Batch, Recipe, StepLoss, supervised_loss

KINDS: tuple[Images, ...] = (*SYNTHETIC, "synthetic", "noise", "true")
SMALL = Row("Small", TrainFFN((8,)))
ON_IMAGES = Row("Taught", DistilOnImages("noise", 50, (8,)), teacher=SMALL)


@pytest.fixture(scope="module")
def work() -> Work:
    """With a teacher that knows its bars."""
    dataset, recipe = make_dataset(), Recipe(epochs=3, batch_size=32, learning_rate=3e-3)
    alone = Work(dataset, PRESETS["compact"], recipe, 0, "cpu", "Taught")
    return replace(alone, teacher=TrainFFN((32,)).make(alone).model)


@pytest.fixture(autouse=True)
def short_generator_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_lab.compress.synthetic.GENERATOR_RECIPE", Recipe(1, 64, 5e-3, weight_decay=0))


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(work: Work, kind: Images, num_images: int = 43) -> Tensor:
    return torch.cat(list(make_images(work, kind, num_images).values()))


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_as_many_as_asked_for_in_range_and_the_same_for_a_seed(work: Work, kind: Images) -> None:
    pixels = made(work, kind)
    assert pixels.shape == (43, 1, 28, 28)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert torch.equal(made(work, kind), pixels)
    assert not torch.equal(made(replace(work, seed=1), kind), pixels)


def test_synthetic_is_evenly_many_of_four_kinds(work: Work) -> None:
    counts = {kind: len(images) for kind, images in make_images(work, "synthetic", 43).items()}
    assert counts == {"augmented": 10, "mixed": 11, "ascended": 11, "generated": 11}


def test_each_image_is_taken_once_before_any_comes_again() -> None:
    pixels = torch.arange(10.0).view(10, 1, 1, 1)
    chosen = taken(pixels, 23, draws(0)).flatten().long()
    counts = torch.bincount(chosen, minlength=10)
    assert counts.tolist().count(3) == 3
    assert counts.tolist().count(2) == 7
    assert chosen.tolist() != sorted(chosen.tolist())


def test_only_images_of_different_classes_are_mixed_in_every_proportion() -> None:
    labels = torch.tensor([2, 0, 2, 1, 2, 2])
    pixels = torch.nn.functional.one_hot(labels, 3).float().view(6, 1, 1, 3)
    shares = mixed(Split(pixels, labels), 600, draws(0)).flatten(1)
    assert ((shares > 0).sum(dim=1) == 2).all()  # never of one class alone
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(600))
    assert shares.amax(dim=1).min() < 0.51
    assert shares.amax(dim=1).max() > 0.99
    pairs = {tuple(row.nonzero().flatten().tolist()) for row in shares}
    assert pairs == {(0, 1), (0, 2), (1, 2)}


def test_nothing_can_be_mixed_of_one_class() -> None:
    with pytest.raises(RunFailed, match="one class"):
        mixed(Split(torch.rand(4, 1, 2, 2), torch.full((4,), 3)), 2, draws(0))


def test_noise_keeps_each_images_grey_values_and_not_their_places() -> None:
    pixels = torch.rand(5, 1, 6, 6)
    shuffled = noise(pixels, 5, draws(0))
    sort = lambda images: sorted(tuple(image.flatten().sort().values.tolist()) for image in images)  # noqa: E731
    assert sort(shuffled) == sort(pixels)
    assert not torch.equal(taken(pixels, 5, draws(0)), shuffled)


def test_on_a_light_ground_images_are_made_dark_on_light(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(work.dataset.spec, mean=0.82, polarity="dark-on-light")
    train = Split(1 - work.dataset.train.pixels, work.dataset.train.labels)
    inverted = replace(work, dataset=replace(work.dataset, spec=spec, train=train))
    assert made(inverted, "augmented").mean() == pytest.approx(1 - float(made(work, "augmented").mean()), abs=0.02)
    monkeypatch.setattr("mnist_lab.compress.synthetic.ASCENT_STEPS", 0)  # where it starts
    torch.testing.assert_close(made(inverted, "ascended"), 1 - made(work, "ascended"))


def test_ascent_raises_the_logit_of_the_wanted_class(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    assert work.teacher is not None
    work.teacher.zero_grad()
    wanted = torch.arange(60) % 10
    after = ascended(work.teacher, work.dataset.spec, 60, draws(0))
    monkeypatch.setattr("mnist_lab.compress.synthetic.ASCENT_STEPS", 0)
    before = ascended(work.teacher, work.dataset.spec, 60, draws(0))
    logits = [work.teacher(pixels).gather(1, wanted.unsqueeze(1)).squeeze(1) for pixels in (before, after)]
    assert (logits[1] > logits[0]).float().mean() > 0.9  # but where steps are too short
    assert (logits[1] - logits[0]).mean() > 1
    is_wanted = [(classes_of(work.teacher, pixels) == wanted).float().mean() for pixels in (before, after)]
    assert is_wanted[0] < 0.25 < 0.45 < is_wanted[1] < 1
    assert all(parameter.grad is None for parameter in work.teacher.parameters())


def test_generator_draws_the_class_that_it_is_told(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = torch.zeros(500, 1, 28, 28)
    labels = torch.arange(500) % 10
    bars[torch.arange(500), 0, 4 + 2 * labels] = 1
    learnable = replace(work, dataset=replace(work.dataset, train=Split(bars, labels)))
    monkeypatch.setattr("mnist_lab.compress.synthetic.GENERATOR_RECIPE", Recipe(20, 64, 5e-3, weight_decay=0))
    generator = train_generator(learnable)
    images = generated(generator, 50, draws(0))
    brightest = images.squeeze(1).sum(dim=2).argmax(dim=1)
    assert (brightest == 4 + 2 * (torch.arange(50) % 10)).float().mean() > 0.5  # by chance 0.1


def test_generators_bound_is_that_of_the_gaussians_by_hand(work: Work) -> None:
    torch.manual_seed(0)
    generator = Generator(work.dataset.spec).eval()
    torch.nn.init.normal_(generator.prior.weight)
    pixels, labels = torch.rand(3, 1, 28, 28), torch.tensor([4, 0, 9])
    told = torch.eye(10)[labels]
    mean, log_variance = generator.encoder(torch.cat([pixels.flatten(1), told], dim=1)).chunk(2, dim=1)
    prior_mean, prior_log_variance = generator.prior(labels).chunk(2, dim=1)
    prior_std = (prior_log_variance / 2).exp()
    chances = generator.draw((mean - prior_mean) / prior_std, labels).flatten(1)
    fit = torch.distributions.Bernoulli(chances, validate_args=False).log_prob(pixels.flatten(1)).sum(dim=1)
    normal = torch.distributions.Normal
    posterior, prior = normal(mean, (log_variance / 2).exp()), normal(prior_mean, prior_std)
    divergence = torch.distributions.kl_divergence(posterior, prior).sum(dim=1)
    bound = generator.bound(pixels, labels)
    torch.testing.assert_close(bound, fit - divergence)
    torch.testing.assert_close(generator(pixels)[torch.arange(3), labels], bound)


@pytest.mark.parametrize("kind", KINDS)
def test_student_never_sees_a_true_label(work: Work, kind: Images) -> None:
    def taught(labels: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        train = work.dataset.train
        other = replace(work.dataset, train=Split(train.pixels, labels(train.labels)))
        return DistilOnImages(kind, 60, (8,)).make(replace(work, dataset=other)).model.state_dict()

    told, lied_to = taught(lambda labels: labels), taught(torch.zeros_like)
    assert all(torch.equal(told[name], lied_to[name]) for name in told)


def test_proof_counts_images_and_classes(work: Work) -> None:
    made = DistilOnImages("synthetic", 100, (8,)).make(work)
    assert made.proof["images"] == dict.fromkeys(SYNTHETIC, 25)
    assert sum(made.proof["of_class"]) == 100
    assert made.proof["true_labels"] == 0
    assert "100" not in made.proof["text"].partition("on images")[2]
    assert "25 augmented, 25 mixed, 25 ascended, 25 generated" in made.proof["text"]


def test_image_keeps_its_class_under_the_recipes_augmentation(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []

    def spy(model: torch.nn.Module, batch: Batch) -> StepLoss:
        seen.append(batch)
        return supervised_loss(model, batch)

    monkeypatch.setattr("mnist_lab.compress.train.train.__defaults__", (spy,))
    recipe = replace(work.recipe, augmentation=Augmentation(), epochs=2)
    DistilOnImages("mixed", 64, (8,)).make(replace(work, recipe=recipe))
    by_row: dict[int, list[tuple[int, Tensor]]] = {}
    for batch in seen:
        for row, label, pixels in zip(batch.rows.tolist(), batch.labels.tolist(), batch.pixels, strict=True):
            by_row.setdefault(row, []).append((label, pixels))
    assert len(by_row) == 64
    for (label, pixels), (label_later, pixels_later) in by_row.values():
        assert label == label_later
        assert not torch.equal(pixels, pixels_later)


@pytest.mark.parametrize("num_images", [0, -1, 10**7])
def test_impossible_numbers_of_images_are_the_users_error(num_images: int) -> None:
    with pytest.raises(UserError, match="--num-images"):
        DistilOnImages(num_images=num_images)


def test_rows_are_named_after_what_they_learn_on() -> None:
    assert student_on_images().name == "KD_FFN_Student-synthetic"
    assert student_on_images(student(FFN), "kmnist").name == "KD_FFN_Student_from_FFN-kmnist"
    assert student_on_images(images="noise", num_images=500).name == "KD_FFN_Student-noise-n500"
    assert student_on_images(images="mixed").technique == "hard kd on mixed images"
    assert student_on_images().teacher == MOE
    assert [row.images_of for row in (student_on_images(images="kmnist"), student_on_images())] == ["kmnist", None]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Its other data set has images that are all alike but for one pixel."""
    dataset = make_dataset()
    pixels = torch.zeros(30, 1, 28, 28)
    pixels[:, :, 0, 0] = torch.linspace(0.1, 1, 30).view(30, 1)
    other = replace(dataset, name="kmnist", train=Split(pixels, torch.zeros(30, dtype=torch.int64)))

    def load(name: str, data_dir: Path | None = None) -> Dataset:
        assert name == "kmnist"
        return other

    monkeypatch.setattr("mnist_lab.experiments.lab.load_dataset", load)
    return make_lab(tmp_path, dataset=dataset)


@pytest.mark.slow
def test_another_data_sets_images_reach_the_step_and_what_a_file_depends_on(lab: Lab) -> None:
    row = replace(ON_IMAGES, step=DistilOnImages("kmnist", 45, (8,)))
    run, plain = Run(lab, row, 0), Run(lab, ON_IMAGES, 0)
    ensure_weights(run)
    metadata = read_metadata(run.output)
    assert metadata["proof"]["images"] == {"kmnist": 45}
    assert metadata["config"]["images_of"] == metadata["config"]["data"]
    assert run.why_stale() is None
    (work,) = (one.work() for one in (run,))
    assert work.images_of is not None
    assert work.images_of.name == "kmnist"
    assert (plain.images_of, plain.work().images_of) == (None, None)
    assert "images_of" not in plain.settings
    assert next(keepers(run)).bound["images"] == work.images_of.fingerprint


@pytest.mark.slow
def test_settings_of_other_rows_are_what_they_were(lab: Lab) -> None:
    assert Run(lab, Row("Taught", Distil(), teacher=SMALL), 0).settings.keys() == {
        "step",
        "form",
        "recipe",
        "preset",
        "data",
    }
