"""What an MoE's experts do on the test split: whose images they get, and what each is worth."""

from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from mnist_lab import measure
from mnist_lab.data import Split
from mnist_lab.deploy.inside import choose_experts
from mnist_lab.experiments.run import Run
from mnist_lab.models import Model
from mnist_lab.models.moe import SparseMoE
from mnist_lab.models.surgery import without_expert
from mnist_lab.progress import progress_bar
from mnist_lab.training import torch_predictor

Experts = npt.NDArray[np.int64]


def expert_by_class(model: SparseMoE, split: Split) -> list[list[float]]:
    """Share of each class's (image, expert) pairs that go to each expert: [class][expert]."""
    with torch.inference_mode():
        experts_NK = torch.cat(
            [model.routed(pixels).experts for pixels in split.pixels.split(measure.EVALUATION_BATCH)]
        )
    num_experts, num_classes = model.config.routing.num_experts, model.config.data.num_classes
    pair_class = split.labels.repeat_interleave(experts_NK.shape[1])
    counts = torch.bincount(pair_class * num_experts + experts_NK.flatten(), minlength=num_classes * num_experts)
    by_class = counts.view(num_classes, num_experts).double()
    shares: list[list[float]] = (by_class / by_class.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    return shares


def acc_without_expert(model: SparseMoE, split: Split) -> list[list[float]] | None:
    """Accuracy on each class with one expert closed: [expert][class]; None where there is only one."""
    num_experts, num_classes = model.config.routing.num_experts, model.config.data.num_classes
    if num_experts == 1:
        return None
    pixels, labels = split.numpy()
    images = np.maximum(np.bincount(labels, minlength=num_classes), 1)
    with torch.inference_mode():
        routed = [model.routed(batch) for batch in split.pixels.split(measure.EVALUATION_BATCH)]
    is_right = torch.cat([batch.logits for batch in routed]).argmax(dim=1).numpy() == labels
    experts_NK = torch.cat([batch.experts for batch in routed]).numpy()
    table = []
    with progress_bar() as progress:
        for expert in progress.track(range(num_experts), description="experts closed"):
            still_right, moved = is_right.copy(), (experts_NK == expert).any(axis=1)  # all others stay as they are
            if moved.any():
                logits = measure.predict(torch_predictor(without_expert(model, expert)), pixels[moved])
                still_right[moved] = logits.argmax(axis=1) == labels[moved]
            table.append((np.bincount(labels[still_right], minlength=num_classes) / images).tolist())
    return table


def routes_of_artifacts(run: Run, model: Model) -> tuple[Experts, Experts] | None:
    """The sets of experts (N, K) that a run's original and its own artifact choose for the test images.

    None where that says nothing: of an original, of a model without experts, with another number of them or of those
    that an image visits, and of a form that ONNX Runtime, which is looked into, does not run.
    """
    original = run.original
    if original == run or not isinstance(model, SparseMoE) or "onnxruntime" not in run.row.form.runtimes:
        return None
    first = model if run.weights == original else run.lab.once("model", original.output, original.load)
    if not isinstance(first, SparseMoE) or _num_chosen(first) != _num_chosen(model):
        return None
    before, after = (
        run.lab.once("test routes", file, partial(choose_experts, file, run.lab.test.numpy()[0]))
        for file in (original.artifact, run.artifact)
    )
    return before, after


def _num_chosen(model: SparseMoE) -> tuple[int, int]:
    """Experts that an image visits, and of how many."""
    return model.config.routing.top_k, model.config.routing.num_experts


def routes_changed(run: Run, model: Model) -> float | None:
    """Share of test images that the artifact sends to other experts than the original's does; None as above."""
    routes = routes_of_artifacts(run, model)
    return None if routes is None else float((routes[0] != routes[1]).any(axis=1).mean())
