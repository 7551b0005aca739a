"""Variants on the command line: sources and teachers by name, seeds, learning rate, widths, no latency, TensorBoard."""

import itertools
import re

import pandas as pd
import pytest
from test_scripts import FOLDER, QUICK, Bench, bench  # noqa: F401  a fixture

from mnist_lab.models.checkpoints import read_metadata
from mnist_lab.report.records import load_record

pytestmark = pytest.mark.slow
PLAIN = ["--no-latency", "--runtime", "onnxruntime"]


def succeed(bench: Bench, *arguments: str) -> str:  # noqa: F811
    """The script's output; its options come after what it is to do, where that is a word."""
    words = itertools.takewhile(lambda argument: not argument.startswith("--"), arguments)
    script = [*words]
    outcome = bench(*script, *QUICK, *arguments[len(script) :], *PLAIN, quick=False)
    assert outcome.code == 0, outcome.err
    return outcome.out


def parents_of(bench: Bench, run_name: str) -> dict[str, str]:  # noqa: F811
    """What a checkpoint was made of, by role."""
    parents = read_metadata(bench.checkpoints / f"{run_name}.safetensors")["parents"]
    return {role: parent["model"] for role, parent in parents.items()}


def test_chain_of_three_from_any_trained_row(bench: Bench) -> None:  # noqa: F811
    succeed(bench, "moe_mnist", "--num-experts", "8", "--top-k", "4")
    out = succeed(bench, *"prune_mnist experts --source Sparse_MoE-E8-K4-epochs1 --keep 3".split())
    assert "kept expert" in out
    fewer = "Sparse_MoE_fewer_experts-3-E8-K4-epochs1"
    assert parents_of(bench, f"{fewer}-seed0") == {"source": "Sparse_MoE-E8-K4-epochs1"}
    succeed(bench, "kd_mnist", "--teacher", fewer, "--windows", "4x5s3")
    taught = "KD_small_from_Sparse_MoE_fewer_experts-w4x5s3-3-E8-K4-epochs1"
    assert parents_of(bench, f"{taught}-seed0") == {"teacher": fewer}
    out = succeed(bench, "ptq_mnist", "--source", taught)
    name = "KD_small_from_Sparse_MoE_fewer_experts_INT8-w4x5s3-3-E8-K4-epochs1"
    record = load_record(bench.results / "runs" / f"{name}-seed0.json")
    assert (record.technique, record.original) == ("kd + static ptq", taught)
    assert f"same class as {taught}" in out
    succeed(bench, "qat_mnist", "--source", fewer, "--bits", "2")
    assert (bench.checkpoints / "Sparse_MoE_fewer_experts_QAT-b2+3-E8-K4-epochs1-seed0.onnx").is_file()


def test_mixtures_are_converted_as_the_moe_is(bench: Bench) -> None:  # noqa: F811
    succeed(bench, "moe_mnist", "--num-experts", "3")
    succeed(bench, "ptq_mnist", "--source", "Sparse_MoE-E3-epochs1")
    assert (bench.checkpoints / "Sparse_MoE_INT8-E3-epochs1-seed0.onnx").is_file()
    succeed(bench, "kd_mnist", *"--teacher Sparse_MoE-E3-epochs1 --student moe --student-experts 2".split())
    assert parents_of(bench, "KD_MoE_Student-E2-E3-epochs1-seed0") == {"teacher": "Sparse_MoE-E3-epochs1"}


def test_recipe_of_the_source_is_taken_over_and_said(bench: Bench) -> None:  # noqa: F811
    succeed(bench, "baseline_mnist", "--learning-rate", "0.002")
    name = "FFN_baseline-epochs1-lr0.002"
    outcome = bench("ptq_mnist", *QUICK[:4], "--source", name, *PLAIN, quick=False)
    assert outcome.code == 0, outcome.err
    assert f"--source {name}: trained with epochs1-lr0.002, and so is what becomes of it" in outcome.out
    assert (bench.checkpoints / "FFN_PTQ_INT8-epochs1-lr0.002-seed0.onnx").is_file()
    other = ["ptq_mnist", *QUICK[:4], "--source", name, "--epochs", "2"]
    bench.expect_user_error(*other, quick=False, says="was trained otherwise than epochs2 says: drop --epochs")


def test_widths_and_learning_rate_are_in_the_name(bench: Bench) -> None:  # noqa: F811
    succeed(bench, "baseline_mnist", "--hidden", "24", "16", "--learning-rate", "1e-3")
    made = read_metadata(bench.checkpoints / "FFN_baseline-h24-h16-epochs1-lr0.001-seed0.safetensors")
    assert made["architecture"]["widths"] == [24, 16]
    assert made["config"]["recipe"]["learning_rate"] == 0.001
    widths = ["--expert-width", "32", "--model-width", "64", "--output-width", "16"]
    succeed(bench, "moe_mnist", *widths)
    made = read_metadata(bench.checkpoints / "Sparse_MoE-m64-h32-o16-epochs1-seed0.safetensors")
    assert [made["architecture"][name] for name in ("model_width", "expert_width", "output_width")] == [64, 32, 16]
    succeed(bench, "ptq_mnist", "--source", "Sparse_MoE-m64-h32-o16-epochs1")


def test_widths_of_the_preset_are_no_departure(bench: Bench) -> None:  # noqa: F811
    succeed(bench, "baseline_mnist", "--hidden", "256", "128")
    succeed(bench, "moe_mnist", "--expert-width", "256")
    made = {path.name for path in bench.checkpoints.glob("*.safetensors")}
    assert made == {"FFN_baseline-epochs1-seed0.safetensors", "Sparse_MoE-epochs1-seed0.safetensors"}


def test_several_seeds_give_one_row_with_its_interval(bench: Bench) -> None:  # noqa: F811
    out = succeed(bench, "baseline_mnist", "--seeds", "3", "--seed", "5")
    assert re.search(r"FFN_baseline-epochs1 .* ± ", out)
    for seed in (5, 6, 7):
        assert (bench.checkpoints / f"FFN_baseline-epochs1-seed{seed}.safetensors").is_file()
        assert f"record: results/{FOLDER}/runs/FFN_baseline-epochs1-seed{seed}.json" in out
    out = succeed(bench, "ptq_mnist", "--seed", "5", "--seeds", "2")
    assert len(re.findall(r"^FFN_\S+ .* ± ", out, flags=re.M)) == 2  # it, and what it is compared with
    bench.expect_user_error("ptq_mnist", "--seed", "5", "--seeds", "4", says="FFN_baseline-epochs1-seed8 is needed")


def test_without_latency_it_is_blank_and_all_else_is_there(bench: Bench) -> None:  # noqa: F811
    load = ["run_all_experiments", "--mode", "load", "--pipeline", "ffn > int8"]
    outcome = bench(*load, "--no-latency")
    assert outcome.code == 0, outcome.err
    table = pd.read_csv(bench.results / "table.csv")
    assert table[["latency_ms_b1", "latency_ms_b64", "latency_ms_b1024", "threads"]].isna().all(axis=None)
    assert table[["test_acc", "size_mib", "file_mb"]].notna().all(axis=None)
    assert "latency" not in outcome.out.partition("checkpoints:")[2].partition("\n\n")[0]
    assert bench(*load).code == 0
    assert pd.read_csv(bench.results / "table.csv")["latency_ms_b1"].notna().all()
    assert bench(*load, "--no-latency").code == 0  # times of another session are none of this one
    assert pd.read_csv(bench.results / "table.csv")["latency_ms_b1"].isna().all()


def test_tensorboard_gets_curves_of_what_trains_and_figures_of_all(bench: Bench) -> None:  # noqa: F811
    pytest.importorskip("tensorboard")
    succeed(bench, "baseline_mnist")
    succeed(bench, "ptq_mnist", "--log", "tensorboard")
    succeed(bench, "moe_mnist", "--log", "tensorboard")
    folders = {path.name: len([*path.iterdir()]) for path in (bench.results / "tensorboard").iterdir()}
    names = {"FFN_baseline": 1, "FFN_PTQ_INT8": 1, "Sparse_MoE": 2}  # while it trains, and when it is measured
    assert folders == {f"{name}-epochs1-seed0": num for name, num in names.items()}
    assert bench("visualize_results", quick=False).code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("ptq_mnist --model ffn --source FFN_baseline", "--model ffn and --source"),
        ("qat_mnist --model moe --source x", "--model moe and --source x"),
        ("ptq_mnist --source FFN_baseline", "there is none yet"),
        ("kd_mnist --teacher Sparse_MoE-E8", "--teacher: Sparse_MoE-E8 is no trained model of seed 0"),
        ("kd_mnist --teacher ../../etc", "no trained model"),
        ("kd_mnist --no-distillation --teacher Sparse_MoE-E8", "drop --teacher"),
        ("baseline_mnist --hidden 0", "--hidden 0 must lie between 1 and"),
        ("baseline_mnist --hidden 99999", "--hidden 99999"),
        ("baseline_mnist --hidden 2.5", "--hidden"),
        ("moe_mnist --expert-width 30", "--expert-width 30 must be a multiple of 4"),
        ("moe_mnist --model-width 0", "--model-width 0"),
        ("moe_mnist --output-width 8192", "--output-width 8192"),
        ("baseline_mnist --learning-rate 0", "--learning-rate 0.0 must be"),
        ("baseline_mnist --learning-rate nan", "--learning-rate nan"),
        ("baseline_mnist --learning-rate inf", "--learning-rate inf"),
        ("baseline_mnist --seeds 0", "--seeds 0"),
        ("moe_mnist --seeds 2 --seed 4294967295", "--seeds 2"),
        ("baseline_mnist --log wandb", "wandb"),
        ("baseline_mnist --log None", "--log"),
        ("claims_mnist --no-latency", "--no-latency"),
    ],
)
def test_bad_input_ends_with_exit_code_2(bench: Bench, arguments: str, says: str) -> None:  # noqa: F811
    bench.expect_user_error(*arguments.split(), says=says)


def test_technique_that_cannot_follow_says_why(bench: Bench) -> None:  # noqa: F811
    succeed(bench, "baseline_mnist")
    succeed(bench, "moe_mnist", "--num-experts", "3")
    ffn, moe = "FFN_baseline-epochs1", "Sparse_MoE-E3-epochs1"
    bench.expect_user_error("ptq_mnist", "--source", "FFN_baselin", says=f"; there are {ffn}, {moe}\n")
    succeed(bench, "qat_mnist", "--source", moe, "--bits", "2")
    for script, arguments, says in [
        (
            "prune_mnist experts",
            f"--source {ffn}",
            f"--source {ffn}: it takes a mixture, and",
        ),
        ("prune_mnist experts", f"--source {moe} --keep 3", "--keep 3"),
        ("prune_mnist router", f"--source {ffn}", "it takes a mixture"),
        ("prune_mnist weights", f"--source {ffn} --allocation utilization", "shares out among experts"),
        ("ptq_mnist", f"--source {ffn} --mode fused", f"{ffn} has none"),
        ("ptq_mnist", f"--source {ffn} --mode weight-only --router-bits 4", f"{ffn} has no router"),
        ("ptq_mnist", "--source Sparse_MoE_QAT_FP32-b2-E3-epochs1", "deployed in those, and in no other form"),
        ("qat_mnist", f"--source {ffn} --router-bits 4", f"{ffn} has no router"),
        ("kd_mnist", f"--teacher {ffn} --student moe", "has no one router to match"),
    ]:
        bench.expect_user_error(*script.split(), *QUICK, *arguments.split(), says=says, quick=False)


def test_missing_package_for_tensorboard_is_said_before_the_work(
    bench: Bench,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mnist_lab.command.options.find_spec", lambda _: None)
    bench.expect_user_error("baseline_mnist", "--log", "tensorboard", says="pip install -r requirements-extra.txt")
