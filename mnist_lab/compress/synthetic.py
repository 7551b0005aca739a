"""Distillation on images that no data set holds: the teacher says what they are, and no true label is used.

Images are float32 in [0, 1], (N, 1, height, width); all that is random comes from the generator that is passed in.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lab import measure
from mnist_lab.compress.train import DenseShape, dense_config, train
from mnist_lab.data import DataSpec, Split, augment
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.measure import EVALUATION_BATCH
from mnist_lab.progress import progress_bar
from mnist_lab.sources import DATASETS, DatasetName
from mnist_lab.training import STRONG, Batch, Recipe, StepLoss, Term, torch_predictor

Synthetic = Literal["augmented", "mixed", "ascended", "generated"]
Images = Literal["synthetic", Synthetic, "noise", "true", DatasetName]
SYNTHETIC: tuple[Synthetic, ...] = get_args(Synthetic)
MAX_IMAGES = 10**6

ASCENT_STEPS = 40
MAX_ASCENT_LENGTH = 0.5  # of a step, in the images' Euclidean norm
START_GRID = 7  # points a side of the noise that an ascent starts from
VARIATION_WEIGHT = 1.0
NORM_WEIGHT = 0.05

GENERATOR_WIDTH = 256
NUM_LATENTS = 16
GENERATOR_RECIPE = Recipe(epochs=10, batch_size=256, learning_rate=2e-3, weight_decay=0.0)


def classes_of(teacher: nn.Module, pixels: Tensor, *, device: str = "cpu") -> Tensor:
    """What the teacher, frozen and in evaluation mode, takes each image for: int64 (N,)."""
    predict = torch_predictor(teacher.to(device), device)
    return torch.from_numpy(measure.predict(predict, pixels.numpy()).argmax(axis=1))


def taken(pixels: Tensor, num_images: int, generator: torch.Generator) -> Tensor:
    """So many of the images in random order; each once before any comes again."""
    order = torch.randperm(len(pixels), generator=generator)
    return pixels[order[torch.arange(num_images) % len(pixels)]]


def augmented(pixels: Tensor, num_images: int, generator: torch.Generator, *, ground: float = 0.0) -> Tensor:
    """Images with a strong random map each, affine and elastic, `ground` outside."""
    parts = taken(pixels, num_images, generator).split(EVALUATION_BATCH)
    return torch.cat([augment(part, STRONG, generator, ground=ground) for part in parts]).clamp_(0, 1)


def mixed(images: Split, num_images: int, generator: torch.Generator) -> Tensor:
    """λ·x + (1 − λ)·x′, the two of different classes, λ even in [0, 1] (mixup, arXiv:1710.09412, with α = 1).

    Raises:
        RunFailed: all images are of one class.
    """
    order = images.labels.argsort(stable=True)
    counts = torch.bincount(images.labels)
    if counts.max() == len(images):
        raise RunFailed("all images are of one class: there is nothing to mix them with")
    first = taken(torch.arange(len(images)), num_images, generator)  # places in the order of classes
    classes = images.labels[order[first]]
    others = len(images) - counts[classes]
    second = counts.cumsum(0)[classes] + (torch.rand(num_images, generator=generator) * others).long()
    weight = torch.rand(num_images, 1, 1, 1, generator=generator)
    left, right = images.pixels[order[first]], images.pixels[order[second % len(images)]]
    return torch.lerp(right, left, weight).clamp_(0, 1)


def noise(pixels: Tensor, num_images: int, generator: torch.Generator) -> Tensor:
    """Images whose pixels are shuffled, each by itself: of the same grey values, and nothing to see."""
    parts = taken(pixels, num_images, generator).split(EVALUATION_BATCH)
    shuffled = [
        part.flatten(1).gather(1, torch.rand(part.flatten(1).shape, generator=generator).argsort(dim=1))
        for part in parts
    ]
    return torch.cat(shuffled).view(num_images, *pixels.shape[1:])


def ascended(
    teacher: nn.Module, data: DataSpec, num_images: int, generator: torch.Generator, *, device: str = "cpu"
) -> Tensor:
    """Images x that rise in logit_c(x) − λ₁·TV(x) − λ₂·‖x − ground‖², from smoothed noise; evenly many of each class c.

    The norm is Simonyan et al.'s prior (2013, arXiv:1312.6034), the total variation Mahendran and Vedaldi's (2014,
    arXiv:1412.0035). Each image has steps of a length of its own, along the gradient, so that some come to where the
    teacher is sure and others stop at the boundary on the way.
    """
    teacher = teacher.to(device).eval()
    classes = torch.arange(num_images) % data.num_classes
    coarse = torch.rand(num_images, 1, START_GRID, START_GRID, generator=generator)
    lengths = MAX_ASCENT_LENGTH * torch.rand(num_images, 1, 1, 1, generator=generator)
    parts = []
    with progress_bar() as progress:
        batches = list(zip(*(each.split(EVALUATION_BATCH) for each in (coarse, classes, lengths)), strict=True))
        for start, wanted, length in progress.track(batches, description="images by ascent"):
            smooth = F.interpolate(start.to(device), size=data.image_size, mode="bicubic", align_corners=False)
            parts.append(_ascend(teacher, _onto(data, smooth), wanted.to(device), length.to(device), data.ground).cpu())
    return torch.cat(parts)


def _onto(data: DataSpec, noise: Tensor) -> Tensor:
    """Noise, even in [0, 1], as strokes on the ground of a data set, of its mean."""
    strokes = (2 * abs(data.mean - data.ground) * noise).clamp_(0, 1)
    return 1 - strokes if data.ground else strokes


def _ascend(teacher: nn.Module, pixels: Tensor, wanted: Tensor, length: Tensor, ground: float) -> Tensor:
    for _ in range(ASCENT_STEPS):
        pixels.requires_grad_()
        variation = pixels.diff(dim=2).abs().sum() + pixels.diff(dim=3).abs().sum()
        prior = VARIATION_WEIGHT * variation + NORM_WEIGHT * (pixels - ground).square().sum()
        logits = teacher(pixels).gather(1, wanted.unsqueeze(1))
        (slope,) = torch.autograd.grad(logits.sum() - prior, pixels)
        norm = slope.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        pixels = (pixels.detach() + length * slope / norm).clamp_(0, 1)
    return pixels


class Generator(nn.Module):
    """A small variational autoencoder (arXiv:1312.6114) that is told the class: p(z | c), p(x | z, c), q(z | x, c).

    The prior of each class is a Gaussian that is learned too, as in Sohn et al. (NeurIPS 2015). As a model it gives of
    every class the evidence lower bound of log p(x | c), float32 (B, C): what can draw each class can tell them apart,
    so that it is trained and watched as any classifier is.
    """

    def __init__(self, data: DataSpec) -> None:
        super().__init__()
        self.data = data
        self.prior = nn.Embedding.from_pretrained(torch.zeros(data.num_classes, 2 * NUM_LATENTS), freeze=False)
        self.encoder = _two_layers(data.num_pixels + data.num_classes, 2 * NUM_LATENTS)
        self.decoder = _two_layers(NUM_LATENTS + data.num_classes, data.num_pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        classes = torch.arange(self.data.num_classes, device=pixels.device)
        return torch.stack([self.bound(pixels, wanted.expand(len(pixels))) for wanted in classes], dim=1)

    def bound(self, pixels: Tensor, classes: Tensor) -> Tensor:
        """E_q[log p(x | z, c)] − KL(q(z | x, c) ‖ p(z | c)) in nats (B,); in evaluation z is the mean of q."""
        told = F.one_hot(classes, self.data.num_classes).float()
        mean, log_variance = self.encoder(torch.cat([pixels.flatten(1), told], dim=1)).chunk(2, dim=1)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        logits = self.decoder(torch.cat([latent, told], dim=1))
        fit = -F.binary_cross_entropy_with_logits(logits, pixels.flatten(1), reduction="none").sum(dim=1)
        prior_mean, prior_log_variance = self.prior(classes).chunk(2, dim=1)
        squares = (log_variance.exp() + (mean - prior_mean).square()) / prior_log_variance.exp()
        return fit - (squares - 1 + prior_log_variance - log_variance).sum(dim=1) / 2

    def draw(self, normal: Tensor, classes: Tensor) -> Tensor:
        """The mean image (B, 1, height, width) of a class and a latent, which is given as standard normal (B, L)."""
        mean, log_variance = self.prior(classes).chunk(2, dim=1)
        told = F.one_hot(classes, self.data.num_classes).float()
        logits: Tensor = self.decoder(torch.cat([mean + normal * (log_variance / 2).exp(), told], dim=1))
        return logits.sigmoid().view(-1, 1, *self.data.image_size)


def _two_layers(fan_in: int, fan_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(fan_in, GENERATOR_WIDTH), nn.ReLU(), nn.Linear(GENERATOR_WIDTH, fan_out))


def train_generator(work: Work) -> Generator:
    """A generator of the classes and training images of `work`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed)
        generator = Generator(work.dataset.spec)
    replace(work, name=f"{work.name} generator", recipe=GENERATOR_RECIPE).fit(generator, _negative_bound)
    return generator


def _negative_bound(model: nn.Module, batch: Batch) -> StepLoss:
    assert isinstance(model, Generator)
    return StepLoss({"negative_bound": Term(-model.bound(batch.pixels, batch.labels).mean())})


@torch.no_grad()
def generated(model: Generator, num_images: int, generator: torch.Generator) -> Tensor:
    """Mean images of random latents, evenly many of each class."""
    latents = torch.randn(num_images, NUM_LATENTS, generator=generator)
    classes = torch.arange(num_images) % model.data.num_classes
    parts = zip(latents.split(EVALUATION_BATCH), classes.split(EVALUATION_BATCH), strict=True)
    return torch.cat([model.draw(*part) for part in parts])


def make_images(work: Work, images: Images, num_images: int) -> dict[Images, Tensor]:
    """Images by kind; `synthetic` is evenly many of all four. Where a class matters, it is the teacher's.

    Raises:
        RunFailed: the teacher takes all images for one class, and they are to be mixed.
    """
    assert work.teacher is not None
    source = (work.images_of or work.dataset).train.pixels
    named = Split(source, classes_of(work.teacher, source, device=work.device))
    generator = torch.Generator().manual_seed(work.seed)
    kinds: tuple[Images, ...] = SYNTHETIC if images == "synthetic" else (images,)
    made: dict[Images, Tensor] = {}
    for place, one in enumerate(kinds):
        num = num_images * (place + 1) // len(kinds) - num_images * place // len(kinds)
        if one == "augmented":
            made[one] = augmented(source, num, generator, ground=work.dataset.spec.ground)
        elif one == "mixed":
            made[one] = mixed(named, num, generator)
        elif one == "ascended":
            made[one] = ascended(work.teacher, work.dataset.spec, num, generator, device=work.device)
        elif one == "generated":
            trained = train_generator(replace(work, dataset=replace(work.dataset, train=named)))
            made[one] = generated(trained, num, generator)
        elif one == "noise":
            made[one] = noise(source, num, generator)
        else:  # true ones, or another data set's
            made[one] = taken(source, num, generator)
    return made


@dataclass(frozen=True)
class DistilOnImages:
    """A small dense model that learns the class for which its teacher takes images; it sees no other label.

    The recipe's augmentation is on as for any row: an image keeps the class that the teacher gave it as it was made.
    """

    cost: ClassVar[float] = 2.5
    images: Images = field(default="synthetic", metadata={"tag": None})
    num_images: int | None = field(default=None, metadata={"tag": "n"})  # as many as the training split has
    shape: DenseShape = field(default="student", metadata={"tag": None})

    def __post_init__(self) -> None:
        if self.num_images is not None and not 1 <= self.num_images <= MAX_IMAGES:
            raise UserError(f"--num-images {self.num_images} must lie between 1 and {MAX_IMAGES:,}")

    @property
    def label(self) -> str:
        return f"hard kd on {self.images} images"

    @property
    def images_of(self) -> DatasetName | None:
        """Another data set, whose images are taken."""
        return next((name for name in DATASETS if name == self.images), None)

    def make(self, work: Work) -> Made:
        assert work.teacher is not None
        made = make_images(work, self.images, self.num_images or len(work.dataset.train))
        pixels = torch.cat(list(made.values()))
        labels = classes_of(work.teacher, pixels, device=work.device)
        on_images = replace(work, dataset=replace(work.dataset, train=Split(pixels, labels)))
        model, curves, proof = train(on_images, dense_config(self.shape, work.preset, work.dataset.spec))
        counts = {kind: len(images) for kind, images in made.items()}
        balance = torch.bincount(labels, minlength=work.dataset.spec.num_classes).tolist()
        counted = ", ".join(f"{num:,} {kind}" for kind, num in counts.items())
        proof |= {"images": counts, "of_class": balance, "true_labels": 0}
        proof["text"] += f", on images without a true label: {counted}; the teacher's classes: {balance}"
        return Made(model, curves, proof)
