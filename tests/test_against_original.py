"""What a model lost against its original, by the formulas."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_record
from test_prune_experts import make_moe
from tiny import HALVED, SMALL, make_dataset, make_lab

from mnist_lab.compress.finetune import Finetuning
from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.prune_experts import ExpertPruning, PruneExperts
from mnist_lab.compress.train import TrainMoE
from mnist_lab.compress.weight_only import Method, WeightOnly
from mnist_lab.experiments import against_original as a
from mnist_lab.experiments.make import make
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import pruned_experts, weight_only
from mnist_lab.experiments.run import Run
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.models.surgery import with_experts
from mnist_lab.report.table import build_table
from mnist_lab.report.text import format_compression


def test_divergence_and_worst_class_are_hand_computed() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    logits = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert a.mean_divergence(reference, logits) == pytest.approx(expected / 2, rel=1e-5)
    before = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2]]
    after = np.eye(3, dtype=np.float32)[[0, 1, 1, 1, 2]]
    labels = np.array([0, 0, 1, 2, 2])
    assert a.worst_class_points(before, after, labels) == -50
    assert a.worst_class_points(before, before, labels) == 0


def test_overlap_is_of_sets() -> None:
    one = torch.tensor([[0, 1], [0, 1], [0, 1]])
    two = torch.tensor([[1, 0], [1, 2], [2, 3]])
    assert a.mean_jaccard(one, two) == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert a.mean_jaccard(one, torch.tensor([[0], [1], [2]])) == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_cka_is_1_for_a_turned_and_scaled_copy_and_little_for_noise() -> None:
    torch.manual_seed(0)
    features = torch.randn(500, 6, dtype=torch.float64)
    features -= features.mean(dim=0)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    other = torch.randn(500, 6, dtype=torch.float64)
    assert a.linear_cka(features, 3 * features @ turn) == pytest.approx(1)
    assert a.linear_cka(features, other - other.mean(dim=0)) < 0.1


def test_routing_of_a_copy_is_the_same_and_of_some_experts_known_by_their_old_numbers() -> None:
    model, pixels = make_moe(), make_dataset().train.pixels
    same = a.compare_routing(model, copy.deepcopy(model), pixels, None)
    assert (same["top1_agreement"], same["routes_jaccard"]) == (1, 1)
    assert same["gate_kl"] == pytest.approx(0, abs=1e-9)
    assert same["load_cv"] == same["load_cv_before"] == pytest.approx(a.variation(model.routed(pixels).expert_load))
    assert same["expert_cka"] == same["expert_cka_before"]
    top = model.routed(pixels).router_probs.log().topk(3, dim=1).values
    assert same["route_margin"] == pytest.approx(float((top[:, 1] - top[:, 2]).mean().detach()), rel=1e-4)
    kept = [1, 3]
    fewer = a.compare_routing(model, with_experts(model, kept), pixels, kept)
    stays = [set(experts) == {1, 3} for experts in model.routed(pixels).experts.tolist()]
    assert 0 < sum(stays) < len(stays)
    overlap = [len(set(experts) & {1, 3}) for experts in model.routed(pixels).experts.tolist()]
    assert fewer["routes_jaccard"] == pytest.approx(np.mean([both / (4 - both) for both in overlap]))
    assert "route_margin" not in fewer
    assert "gate_kl" not in fewer


def test_a_gate_that_is_all_but_sure_gives_a_finite_divergence() -> None:
    model, pixels = make_moe(), make_dataset().train.pixels
    sure = copy.deepcopy(model)
    with torch.no_grad():
        sure.router.gate.mul_(1e4)
    for one, two in ((model, sure), (sure, model)):
        assert math.isfinite(a.compare_routing(one, two, pixels, None)["gate_kl"])


def test_experts_to_which_next_to_nothing_comes_are_dead() -> None:
    model = make_moe(RoutingConfig(num_experts=4, top_k=1))
    with torch.no_grad():
        model.router.gate[:, 2:] = -1e3
        model.stem.bias.add_(1)
    assert a.compare_routing(model, model, make_dataset().train.pixels, None)["dead_experts"] >= 2


def test_record_and_table_hold_it_for_what_was_made_of_another(tmp_path: Path) -> None:
    lab = make_lab(tmp_path)
    original, halved = (make(Run(lab, row, 0)) for row in (SMALL, HALVED))
    assert original.against_original is None
    found = halved.against_original
    assert found is not None
    assert found["params_ratio"] == 1
    assert found["nonzero_params"] == pytest.approx(halved.params_total / 2, rel=0.05)
    assert found["kl_to_original"] > 0
    assert found["file_ratio"] == pytest.approx(1, abs=0.01)
    ours, theirs = (record.measurements["pytorch"].test_acc for record in (halved, original))
    assert found["acc_points"] == pytest.approx(100 * (ours - theirs))
    table = build_table([original, halved])
    text = format_compression(table, style="simple")
    assert "Halved" in text
    assert "Small" not in text
    assert "gate" not in text  # no column without a value
    assert format_compression(build_table([make_record()]), style="simple") == ""


def test_memory_is_of_all_parameters_and_of_a_pass(tmp_path: Path) -> None:
    lab = make_lab(tmp_path)
    make(Run(lab, SMALL, 0))
    record = make(Run(lab, HALVED, 0))
    assert record.against_original is not None
    num_params, num_images, width = record.params_total, 100, 8
    assert record.against_original["params_mib"] == pytest.approx(4 * num_params / 2**20)
    expected = num_images * (784 + width) * 4 / 2**20  # normalised pixels and what the first layer makes of them
    assert record.against_original["activations_mib"] == pytest.approx(expected)
    assert record.against_original["activations_mib_before"] == pytest.approx(expected)
    assert set(build_table([record])["params_mib"]) == {record.against_original["params_mib"]}


def test_rerouted_images_are_those_whose_set_of_experts_is_another() -> None:
    before = np.array([[0, 1], [0, 1], [1, 2], [0, 2]])
    after = np.array([[0, 1], [0, 2], [0, 2], [0, 2]])
    found = a.compare_artifacts(before, after, np.array([True, True, False, False]), num_experts=4)
    assert found["rerouted"] == 0.5
    assert (found["rerouted_other_class"], found["rerouted_same_class"]) == (0.25, 0.25)
    loads = {"load_cv_before": [3, 3, 2, 0], "load_cv": [4, 1, 3, 0]}  # an expert to which nothing comes counts
    assert {key: found[key] for key in loads} == {
        key: pytest.approx(np.std(load) / np.mean(load)) for key, load in loads.items()
    }
    same = a.compare_artifacts(before, before, np.array([True, False, False, False]), num_experts=3)
    assert (same["rerouted"], same["rerouted_other_class"], same["rerouted_same_class"]) == (0, 0, 0)


@pytest.mark.slow
def test_routes_are_compared_between_as_many_experts(tmp_path: Path) -> None:
    lab = make_lab(tmp_path)
    mixture = Row("Mixture", TrainMoE(RoutingConfig(num_experts=3)))
    rounded = make(Run(lab, weight_only(mixture, WeightOnly(Rounding(2), Method("nearest"))), 0))
    found = rounded.against_original
    assert found is not None
    assert found["rerouted"] == pytest.approx(found["rerouted_other_class"] + found["rerouted_same_class"])
    assert found["rerouted"] == rounded.routes_changed
    assert set(build_table([rounded])["rerouted"]) == {found["rerouted"]}
    fewer = PruneExperts(ExpertPruning(2), finetuning=Finetuning(finetune_epochs=0))  # an image still visits 2
    left = make(Run(lab, pruned_experts(fewer, mixture), 0))
    assert left.against_original is not None
    assert "rerouted" not in left.against_original
    assert left.routes_changed is None
