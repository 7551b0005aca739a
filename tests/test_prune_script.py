"""`prune_mnist.py`, as the command line runs it."""

import pytest
from test_scripts import FOLDER, QUICK, Bench, bench, finished, finished_bench  # noqa: F401  fixtures

from mnist_lab.models.checkpoints import load_checkpoint
from mnist_lab.models.ffn import FFN
from mnist_lab.report.records import load_record

pytestmark = pytest.mark.slow


def prune(bench: Bench, kind: str, *arguments: str, says: str = "") -> str:  # noqa: F811
    """The script's output; where it `says` what is wrong, that it does."""
    if says:
        bench.expect_user_error("prune_mnist", kind, *QUICK, *arguments, says=says, quick=False)
        return ""
    outcome = bench("prune_mnist", kind, *QUICK, *arguments, quick=False)
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_weights_are_zero_in_the_file_and_the_record_says_how_many(finished_bench: Bench) -> None:  # noqa: F811
    out = prune(finished_bench, "weights", "--model", "ffn", "--ratio", "0.5")
    assert "50.0% of the weights are zero" in out
    assert "in torch-sparse" in out  # as it is in PyTorch
    name = "FFN_baseline_pruned-0.5-epochs1-seed0"
    model = load_checkpoint(finished_bench.checkpoints / f"{name}.safetensors").model
    assert isinstance(model, FFN)
    weights = [weight for weight in model.parameters() if weight.ndim == 2]
    assert [float((weight == 0).double().mean()) for weight in weights] == [pytest.approx(0.5, abs=1e-3)] * 3
    record = load_record(finished_bench.results / "runs" / f"{name}.json")
    assert record.original == "FFN_baseline-epochs1"
    assert record.proof is not None
    assert record.proof["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert record.proof["bytes_by_form"]["dense FP32"] == 4 * sum(weight.numel() for weight in weights)


def test_file_of_mostly_zeros_is_smaller_and_the_script_says_why(finished_bench: Bench) -> None:  # noqa: F811
    out = prune(finished_bench, "weights", "--model", "ffn", "--ratio", "0.95")
    assert "3 of 3 matrices sparse: 5.0% of their values with an index of 8 bytes each" in out
    assert "smallest would be sparse INT8" in out
    whole, pruned = (
        finished_bench.checkpoints / f"{name}-epochs1-seed0.onnx"
        for name in ("FFN_baseline", "FFN_baseline_pruned-0.95")
    )
    assert pruned.stat().st_size < 0.17 * whole.stat().st_size


def test_one_expert_is_a_smaller_dense_model(finished_bench: Bench) -> None:  # noqa: F811
    out = prune(finished_bench, "experts", "--keep", "1", "--criterion", "reap", "--teacher", "self")
    assert "kept expert " in out
    (path,) = finished_bench.checkpoints.glob("Sparse_MoE_fewer_experts-1-reap-*.safetensors")
    assert isinstance(load_checkpoint(path).model, FFN)
    whole = finished_bench.checkpoints / "Sparse_MoE-epochs1-seed0.onnx"
    assert path.with_suffix(".onnx").stat().st_size < 0.46 * whole.stat().st_size


def test_narrower_layers_are_a_smaller_file(finished_bench: Bench) -> None:  # noqa: F811
    out = prune(finished_bench, "neurons", "--ratio", "0.5", "--widths", "alike")
    assert "stem 128 of 256, experts 128 of 256, output 128 of 256" in out
    (path,) = finished_bench.checkpoints.glob("Sparse_MoE_narrower-alike-*.onnx")
    whole = finished_bench.checkpoints / "Sparse_MoE-epochs1-seed0.onnx"
    assert path.stat().st_size < 0.4 * whole.stat().st_size


def test_router_says_how_many_images_it_still_sends_where_it_did(finished_bench: Bench) -> None:  # noqa: F811
    assert "50.0% of the router's weights are zero" in prune(finished_bench, "router")


def test_merged_experts_are_named(finished_bench: Bench) -> None:  # noqa: F811
    assert "experts merged: " in prune(finished_bench, "merge", "--group", "outputs")


def test_experts_share_a_base(finished_bench: Bench) -> None:  # noqa: F811
    assert "50.7% of the parameters left: experts add rank 8" in prune(finished_bench, "shared-base")


def test_rank_that_saves_nothing_fails_with_a_line(finished_bench: Bench) -> None:  # noqa: F811
    outcome = finished_bench("prune_mnist", "shared-base", *QUICK, "--rank", "200", quick=False)
    assert (outcome.code, "rank 200 makes nothing smaller" in outcome.err) == (1, True)


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("weights", ["--ratio", "0"], "--ratio"),
        ("weights", ["--ratio", "1"], "--ratio"),
        ("weights", ["--model", "ffn", "--allocation", "utilization"], "--allocation"),
        ("weights", ["--scope", "global", "--allocation", "sensitivity"], "--allocation"),
        ("weights", ["--finetune-epochs", "-1"], "--finetune-epochs"),
        ("neurons", ["--ratio", "1"], "--ratio"),
        ("router", ["--ratio", "2"], "--ratio"),
        ("merge", ["--keep", "4"], "--keep"),
        ("shared-base", ["--rank", "0"], "--rank"),
        ("neurons", ["--criterion", "wanda"], "--criterion"),
        ("merge", ["--align", "abc"], "--align"),
        ("experts", ["--keep", "0"], "--keep"),
        ("experts", ["--keep", "4"], "--keep"),
        ("experts", ["--keep", "1", "--train", "router"], "--train"),
        ("experts", ["--model", "ffn"], "--model"),
    ],
)
def test_bad_input_ends_with_exit_code_2(bench: Bench, kind: str, arguments: list[str], says: str) -> None:  # noqa: F811
    prune(bench, kind, *arguments, says=says)


def test_what_it_prunes_is_needed_first(bench: Bench) -> None:  # noqa: F811
    prune(bench, "experts", says="Sparse_MoE")
