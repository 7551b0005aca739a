"""`adapt_mnist.py`, as the command line runs it; the other data set is the bundled one under another name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_scripts import FOLDER, QUICK, Bench, bench, finished, finished_bench  # noqa: F401  fixtures

from mnist_lab import data
from mnist_lab.models.checkpoints import read_metadata
from mnist_lab.report.records import load_record

pytestmark = pytest.mark.slow
FROM_DIGITS = ["--source-dataset", "digits", "--dataset", "kmnist", "--recipe", "quick", "--epochs", "1"]
TARGET = "kmnist-compact-quick"


@pytest.fixture(autouse=True)
def bars_for_kmnist(toy_dataset: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """KMNIST cannot be had, so bars take its place."""
    real_load = data.load_dataset

    def load(name: Any = None, data_dir: Path | None = None, _: Any = None) -> data.Dataset:
        return replace(toy_dataset, name="kmnist") if name == "kmnist" else real_load(name, data_dir)

    for module in ("mnist_lab.command.console", "mnist_lab.experiments.lab"):
        monkeypatch.setattr(f"{module}.load_dataset", load)


def adapt(bench: Bench, *arguments: str) -> str:  # noqa: F811
    outcome = bench("adapt_mnist", *FROM_DIGITS, *arguments, quick=False)
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_model_of_one_data_set_becomes_one_of_another(finished_bench: Bench) -> None:  # noqa: F811
    out = adapt(finished_bench, "--rank", "2", "--init", "loftq")
    assert "2.6% of all, beside a base of 4.5 bits a weight" in out
    name = "Sparse_MoE_adapted-digits-R2-loftq-epochs1-seed0"
    metadata = read_metadata(finished_bench.folder / "checkpoints" / TARGET / f"{name}.safetensors")
    assert metadata["dataset"] == "kmnist"
    assert metadata["architecture"]["data"]["mean"] == 0.18
    assert metadata["parents"]["source"]["file"] == f"../{FOLDER}/Sparse_MoE-epochs1-seed0.safetensors"
    record = load_record(finished_bench.folder / "results" / TARGET / "runs" / f"{name}.json")
    assert (record.technique, record.original) == ("moe + adapters", FOLDER)
    assert record.proof is not None
    assert record.proof["step_bytes"] < record.proof["step_bytes_of_all"]
    assert set(record.measurements) == {"pytorch", "onnxruntime"}


@pytest.mark.parametrize("model", ["ffn", "student"])
def test_training_all_is_beside_it_under_another_name(finished_bench: Bench, model: str) -> None:  # noqa: F811
    source = {"ffn": "FFN_baseline", "student": "KD_FFN_Student"}[model]
    assert "all " in adapt(finished_bench, "--model", model, "--full", "--finetune-epochs", "2")
    adapt(finished_bench, "--model", model)
    made = {path.name for path in (finished_bench.folder / "checkpoints" / TARGET).glob("*.safetensors")}
    assert made == {f"{source}_{name}-epochs1-seed0.safetensors" for name in ("finetuned-digits-ft2", "adapted-digits")}


def test_any_row_of_the_other_data_set_is_a_source_with_its_own_recipe(finished_bench: Bench) -> None:  # noqa: F811
    name = "FFN_Student_no_KD-epochs1"
    outcome = finished_bench("adapt_mnist", *FROM_DIGITS[:-2], "--source", name, "--no-latency", quick=False)
    assert outcome.code == 0, outcome.err
    assert f"--source {name}: trained with epochs1" in outcome.out
    made = [path.name for path in (finished_bench.folder / "checkpoints" / TARGET).glob("*.safetensors")]
    assert made == ["FFN_Student_no_KD_adapted-digits-epochs1-seed0.safetensors"]
    finished_bench.expect_user_error(
        "adapt_mnist", *FROM_DIGITS, "--source", "FFN", says=f"in checkpoints/{FOLDER}; there are FFN_", quick=False
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rank", "0"], "--rank 0"),
        (["--init", "gaussian"], "--init"),
        (["--finetune-epochs", "-1"], "--finetune-epochs"),
        (["--full", "--rank", "8"], "drop --rank"),
        (["--full", "--init", "loftq"], "drop --rank"),
        (["--dataset", "digits"], "--dataset digits is what"),
        (["--source-dataset", "cifar"], "cifar"),
        (["--teacher", "self"], "--teacher"),
    ],
)
def test_bad_input_ends_with_exit_code_2(bench: Bench, arguments: list[str], says: str) -> None:  # noqa: F811
    bench.expect_user_error("adapt_mnist", *FROM_DIGITS, *arguments, says=says, quick=False)


def test_rank_beyond_a_layers_width_is_named(finished_bench: Bench) -> None:  # noqa: F811
    adapt(finished_bench)
    finished_bench.expect_user_error("adapt_mnist", *FROM_DIGITS, "--rank", "257", says="at most 256", quick=False)


def test_source_is_needed_first_and_on_which_data(bench: Bench) -> None:  # noqa: F811
    bench.expect_user_error(
        "adapt_mnist", *FROM_DIGITS, says="python moe_mnist.py --dataset digits, and the same", quick=False
    )
