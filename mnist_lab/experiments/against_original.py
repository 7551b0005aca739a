"""What a compressed model has lost and saved against its original, and what became of its routing."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnist_lab import measure
from mnist_lab.experiments.experts import Experts, routes_of_artifacts
from mnist_lab.experiments.run import Run, read_provenance
from mnist_lab.experiments.technique import Proof
from mnist_lab.memory import measure_peak
from mnist_lab.models import Model, count_parameters, inference_parameters, parameter_bytes
from mnist_lab.models.moe import SparseMoE

NUM_IMAGES = 1000  # of the test split, on which experts are compared and a pass's memory is taken
Figures = dict[str, float]


def compare_with_original(
    run: Run, model: Model, stored: Model | None, proof: Proof, *, logits: measure.Array, reference: measure.Array
) -> Figures | None:
    """Figures of a run against the first model of its chain; None of that itself.

    Args:
        model: that its files were written from.
        stored: the model with the weights of the run's own file, where that holds a PyTorch model.
        proof: of what was done; "kept" names the experts that stay, of those of its source.
        logits: (N, C) of the test images in the run's own runtime, and
        reference: those of its original in PyTorch.
    """
    original = run.original
    if original == run:
        return None
    labels = run.lab.test.numpy()[1]
    figures = {
        "file_ratio": original.artifact.stat().st_size / run.artifact.stat().st_size,
        "acc_points": 100 * (measure.accuracy(logits, labels) - measure.accuracy(reference, labels)),
        "kl_to_original": mean_divergence(reference, logits),
        "worst_class_points": worst_class_points(reference, logits, labels),
    }
    if isinstance(model, SparseMoE) and (routes := routes_of_artifacts(run, model)) is not None:
        is_other = logits.argmax(axis=1) != reference.argmax(axis=1)
        figures |= compare_artifacts(*routes, is_other, num_experts=model.config.routing.num_experts)
    if stored is None:
        return figures
    before = run.lab.once("model", original.output, original.load)
    figures["params_ratio"] = count_parameters(before)[0] / count_parameters(stored)[0]
    figures["nonzero_params"] = float(sum(int((p != 0).sum()) for p in inference_parameters(stored).values()))
    if run.row.step is not None:
        figures["params_mib"] = parameter_bytes(stored) / measure.MIB
        for name, model in (("activations_mib_before", before), ("activations_mib", stored)):
            figures[name] = peak_activations(model, run.lab.test.pixels[:NUM_IMAGES]) / measure.MIB
    if isinstance(before, SparseMoE) and isinstance(stored, SparseMoE) and run.row.step is not None:
        figures |= compare_routing(before, stored, run.lab.test.pixels[:NUM_IMAGES], kept_experts(run, proof))
    return figures


def kept_experts(run: Run, proof: Proof) -> list[int] | None:
    """Which of the original's experts a run has, in its own order; None where no step of its chain took any out."""
    own: list[int] | None = proof.get("kept")
    source = run.parents.get("source")
    before = kept_experts(source, read_provenance(source.output).proof) if source is not None else None
    return own if before is None else before if own is None else [before[expert] for expert in own]


def compare_artifacts(before: Experts, after: Experts, is_other: npt.NDArray[np.bool_], *, num_experts: int) -> Figures:
    """How two artifacts of a mixture route the same images.

    Args:
        before: sets of experts (N, K) of the original's, and
        after: of the other.
        is_other: (N,), images whose class changed.
    """
    is_rerouted = (before != after).any(axis=1)
    loads = (torch.from_numpy(np.bincount(experts.ravel(), minlength=num_experts)) for experts in (before, after))
    load_cv_before, load_cv = map(variation, loads)
    return {
        "rerouted": float(is_rerouted.mean()),
        "rerouted_other_class": float((is_rerouted & is_other).mean()),
        "rerouted_same_class": float((is_rerouted & ~is_other).mean()),
        "load_cv_before": load_cv_before,
        "load_cv": load_cv,
    }


@torch.inference_mode()
def peak_activations(model: Model, pixels: Tensor) -> int:
    """Bytes of all results that a pass in PyTorch holds at once, at most."""
    return measure_peak(lambda: model(pixels))[1]


def mean_divergence(reference: measure.Array, logits: measure.Array) -> float:
    """KL(original ‖ model) in nats, mean over images."""
    p, q = measure.log_softmax(reference), measure.log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def worst_class_points(reference: measure.Array, logits: measure.Array, labels: measure.Labels) -> float:
    """Change in accuracy of the class that lost most, percentage points."""
    gain = (logits.argmax(axis=1) == labels).astype(float) - (reference.argmax(axis=1) == labels)
    return 100 * min(float(gain[labels == label].mean()) for label in np.unique(labels))


@torch.inference_mode()
def compare_routing(before: SparseMoE, after: SparseMoE, pixels: Tensor, kept: Sequence[int] | None) -> Figures:
    """How two mixtures route the same images.

    Args:
        kept: which of the experts before those after are; all, in their order, when not given.
    """
    was, now = before.routed(pixels), after.routed(pixels)
    names = torch.tensor(kept if kept is not None else range(before.config.routing.num_experts))
    experts_now = names[now.experts]
    figures = {
        "top1_agreement": float((was.experts[:, 0] == experts_now[:, 0]).double().mean()),
        "routes_jaccard": mean_jaccard(was.experts, experts_now),
        "load_cv_before": variation(was.expert_load),
        "load_cv": variation(now.expert_load),
        "dead_experts": float((now.expert_load < measure.DEAD_SHARE * now.expert_load.double().mean()).sum()),
        "expert_cka_before": mean_similarity(before, pixels),
        "expert_cka": mean_similarity(after, pixels),
    }
    if kept is None:
        p, q = (model.router(model.embed(pixels)).logits_BE.double().log_softmax(dim=1) for model in (before, after))
        figures["gate_kl"] = float((p.exp() * (p - q)).sum(dim=1).mean())
    if (margin := mean_margin(after, pixels)) is not None:
        figures["route_margin"] = margin
    return figures


def mean_jaccard(one_BK: Tensor, two_BK: Tensor) -> float:
    """|A ∩ B| / |A ∪ B| of the chosen sets, mean over images."""
    both = (one_BK.unsqueeze(2) == two_BK.unsqueeze(1)).any(dim=2).sum(dim=1)
    return float((both / (one_BK.shape[1] + two_BK.shape[1] - both)).double().mean())


def variation(load_E: Tensor) -> float:
    """Standard deviation / mean of the load."""
    load_E = load_E.double()
    return float(load_E.std(unbiased=False) / load_E.mean())


def mean_margin(model: SparseMoE, pixels: Tensor) -> float | None:
    """How far the K-th expert's logit lies above the next one's; None where there is no next."""
    top_k = model.config.routing.top_k
    if top_k == model.config.routing.num_experts:
        return None
    top = (model.embed(pixels) @ model.router.gate).topk(top_k + 1, dim=1).values
    return float((top[:, top_k - 1] - top[:, top_k]).double().mean())


def mean_similarity(model: SparseMoE, pixels: Tensor) -> float:
    """Linear CKA (arXiv:1905.00414) between the outputs of each two experts on the same images, mean over pairs; 1 when
    they say the same up to rotation and scale.
    """
    hidden_BD, experts = model.embed(pixels), model.experts
    outputs = []
    for weights in zip(experts.weight_in, experts.bias_in, experts.weight_out, experts.bias_out, strict=True):
        weight_in, bias_in, weight_out, bias_out = weights
        output = torch.addmm(bias_out, torch.addmm(bias_in, hidden_BD, weight_in).relu(), weight_out).double()
        outputs.append(output - output.mean(dim=0))
    pairs = [linear_cka(one, two) for one, two in itertools.combinations(outputs, 2)]
    return float(np.mean(pairs)) if pairs else 1.0


def linear_cka(one: Tensor, two: Tensor) -> float:
    """‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖) of centred features (N, O)."""
    return float((one.T @ two).square().sum() / ((one.T @ one).norm() * (two.T @ two).norm()).clamp(min=1e-30))
