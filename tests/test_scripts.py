"""The scripts end to end, on the bundled digits, one epoch a model."""

import dataclasses
import importlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch

from mnist_lab import data, measure, sources, training
from mnist_lab.command import console
from mnist_lab.command.entry import run_script
from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.compress.int8 import Calibration
from mnist_lab.compress.train import TrainFFN
from mnist_lab.errors import TrainingDiverged
from mnist_lab.experiments import latencies
from mnist_lab.experiments.rows import MODELS, TABLE
from mnist_lab.models.checkpoints import read_metadata
from mnist_lab.report import figures
from mnist_lab.report.columns import COLUMNS
from mnist_lab.report.records import load_records
from mnist_lab.runtimes import why_missing
from mnist_lab.studies.claims import rows as claims_rows
from mnist_lab.studies.claims import run as claims_run
from mnist_lab.studies.claims.compression_figures import PRUNING_CLAIM_FIGURES
from mnist_lab.studies.claims.figures import CLAIM_FIGURES

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "baseline_mnist": "BaselineOptions",
    "moe_mnist": "MoEOptions",
    "ptq_mnist": "PTQOptions",
    "qat_mnist": "QATOptions",
    "kd_mnist": "KDOptions",
    "run_all_experiments": "RunOptions",
    "visualize_results": "PlotOptions",
    "claims_mnist": "ClaimOptions",
    "dark_knowledge_mnist": "DarkKnowledgeOptions",
    "adapt_mnist": "AdaptOptions",
    "compare_onnx": "CompareOptions",
    "sweep": "SweepOptions",
}
# Fields that are options of their own, or none.
GROUPS = {
    "file",
    "preparation",
    "grid",
    "small",
    "adapters",
    "duration",
    "routing",
    "widths",
    "softening",
    "mixture",
    "matching",
    "images",
    "calibration",
    "rounding",
    "method",
    "quantization",
    "training",
}
OF_SUBCOMMANDS = {"prune_mnist": "PruneOptions"}
OF_FILES = {"classify": "ClassifyOptions", "deploy_mnist": "DeployOptions"}
FOLDER = "digits-compact-quick"
QUICK = ["--dataset", "digits", "--recipe", "quick", "--epochs", "1"]
pytestmark = pytest.mark.slow


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Bench:
    """Runs scripts in this process, as the command line would, in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self._monkeypatch, self._capfd = folder, monkeypatch, capfd
        self.checkpoints, self.results = folder / "checkpoints" / FOLDER, folder / "results" / FOLDER

    def __call__(self, script: str, *arguments: str, quick: bool = True, stdin: str = "") -> Outcome:
        self._monkeypatch.chdir(self.folder)
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._capfd.readouterr()
        code = run(script, [*QUICK * quick, *arguments], self._monkeypatch)
        captured = self._capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    def expect_user_error(self, *arguments: str, says: str, quick: bool = True, stdin: str = "") -> None:
        """Exit code 2, a short message without traceback, and not one file changed."""
        before = self.files()
        outcome = self(*arguments, quick=quick, stdin=stdin)
        assert outcome.code == 2, outcome
        assert says in outcome.err
        assert "Traceback" not in outcome.err
        assert "'None'," not in outcome.err  # among what is allowed
        assert self.files() == before

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


def run(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    module = importlib.import_module(script)
    monkeypatch.setattr(latencies, "NUM_ROUNDS", 1)
    if script == "run_all_experiments":
        monkeypatch.setattr(module, "has_bfloat16", lambda: True)  # torch emulates it where the CPU has none
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as exit_info:
        run_script(module.main, getattr(module, (OPTIONS | OF_SUBCOMMANDS | OF_FILES)[script]), module.__doc__ or "")
    return int(exit_info.value.code or 0)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    monkeypatch.setattr(figures, "draw_all", lambda *_: [])  # drawn once, by `finished`
    monkeypatch.delenv("MNIST_LAB_DATA", raising=False)
    return Bench(tmp_path, monkeypatch, capfd)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole suite has run once, over two seeds."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert run("run_all_experiments", ["--mode", "train", *QUICK, "--seeds", "2"], monkeypatch) == 0
    return folder


@pytest.fixture
def finished_bench(bench: Bench, finished: Path) -> Bench:
    shutil.copytree(finished, bench.folder, dirs_exist_ok=True)
    return bench


class TestWholeSuite:
    def test_table_has_every_model_runtime_and_figure(self, finished: Path) -> None:
        table = pd.read_csv(finished / "results" / FOLDER / "table.csv")
        assert list(table.columns)[: len(COLUMNS)] == [column.name for column in COLUMNS]
        asked = ("pytorch", "onnxruntime")
        expected = [
            (f"{row.name}-epochs1", runtime) for row in TABLE for runtime in asked if runtime in row.form.runtimes
        ]
        assert list(zip(table["model"], table["runtime"], strict=True)) == expected
        assert (table["seeds"] == 2).all()
        assert table[[column.name for column in COLUMNS]].notna().all(axis=None)
        fp32_size = table[table["runtime"] == "onnxruntime"].set_index("model")["size_mib"]
        for _, row in table[table["precision"] == "INT8"].iterrows():
            assert row["size_mib"] <= 0.28 * fp32_size[row["original"]]

    def test_all_plots_are_there(self, finished: Path) -> None:
        drawn = {path.stem for path in (finished / "results" / FOLDER / "plots").glob("*.png")}
        assert drawn == figures.FIGURES.keys() - figures.OF_COMPRESSED.keys()

    def test_report_has_all_of_it_but_the_demo(self, finished: Path) -> None:
        page = (finished / "results" / FOLDER / "report.html").read_text()
        assert page.count("<figure id=") == len(figures.FIGURES) - len(figures.OF_COMPRESSED)
        assert "Missed by most models" in page
        assert "Expert 3" in page
        assert "No live demo in this page: `make report` fetches" in page

    def test_every_file_is_what_its_record_says(self, finished: Path) -> None:
        records = load_records(finished / "results" / FOLDER)
        assert {record.row for record in records} == {row.name for row in TABLE}
        for record in records:
            for runtime, measurement in record.measurements.items():
                file = record.artifact["file"] if runtime == "onnxruntime" else record.checkpoint["file"]
                path = finished / "checkpoints" / FOLDER / file
                assert measurement.file_mb == pytest.approx(path.stat().st_size / 1e6)
                assert 0.9 < measurement.same_class <= 1
            assert record.proof is not None
            assert (record.layout is not None) == ("MoE" in record.model)

    def test_both_runtimes_see_the_same_model(self, finished: Path) -> None:
        for record in load_records(finished / "results" / FOLDER):
            if record.precision == "FP32":
                first, second = record.measurements["pytorch"], record.measurements["onnxruntime"]
                assert first.test_loss == pytest.approx(second.test_loss, rel=1e-4)
                assert first.largest_gap < 1e-4
                assert second.largest_gap < 1e-4
            else:
                assert all(measurement.largest_gap > 1e-4 for measurement in record.measurements.values())

    def test_load_by_a_prompt_through_a_pipe_trains_nothing(self, finished_bench: Bench) -> None:
        before = finished_bench.files()
        outcome = finished_bench("run_all_experiments", stdin="what?\nLOAD\n")
        assert outcome.code == 0
        assert "train/load" in outcome.out
        assert outcome.out.count(": found") == len(TABLE)
        changed = {name for name, content in finished_bench.files().items() if content != before.get(name)}
        assert not any("checkpoints" in name for name in changed)

    @pytest.mark.parametrize("answer", ["", "what?\n", "y\n" * 1000])
    def test_prompt_without_an_answer_ends(self, finished_bench: Bench, answer: str) -> None:
        finished_bench.expect_user_error("run_all_experiments", says="--mode", stdin=answer)

    def test_runtime_asked_for_with_another_seed_is_timed(self, finished_bench: Bench) -> None:
        assert finished_bench("run_all_experiments", "--mode", "load", "--runtime", "openvino", "--seed", "1").code == 0
        table = pd.read_csv(finished_bench.results / "table.csv")
        assert set(table["runtime"]) == {"openvino"}
        assert table["latency_ms_b64"].notna().all()

    def test_broken_record_is_named_before_the_work(self, finished_bench: Bench) -> None:
        path = finished_bench.results / "runs" / "FFN_baseline-epochs1-seed0.json"
        path.write_text(path.read_text()[:100])
        finished_bench.expect_user_error("run_all_experiments", "--mode", "load", says=path.name)


class TestClaims:
    def test_every_claim_gets_a_verdict_and_finished_seeds_are_not_run_again(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (claims_rows, claims_run):
            monkeypatch.setattr(module, "CALIBRATIONS", (Calibration(), Calibration(10, "entropy")))
            monkeypatch.setattr(module, "GRID", [DistillationConfig(t, a) for t in (1, 3) for a in (0.7, 1)])
        monkeypatch.setattr(claims_run, "_num_workers", lambda *_: 1)
        assert bench("claims_mnist", "--seeds", "2").code == 0
        findings = json.loads((bench.results / "claims.json").read_text())
        assert {finding["claim"] for finding in findings} == {*range(1, 15)} - {12}
        assert {finding["n"] for finding in findings} == {2}
        monkeypatch.setattr("mnist_lab.experiments.technique.fit", None)  # would fail if it were called
        outcome = bench("claims_mnist", "--seeds", "2")
        assert outcome.code == 0
        assert outcome.out.count(" 0 of 2 seeds to make") == 3  # the table and its variants, the grid, the winner
        assert "verdict" in outcome.out
        drawn = {path.stem for path in (bench.results / "claims" / "plots").iterdir()}
        assert drawn == set(CLAIM_FIGURES)

    def test_claims_about_pruning_are_settled_without_the_others(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claims_run, "_num_workers", lambda *_: 1)
        arguments = [*QUICK[:4], "--suite", "compression", "--seeds", "2"]  # after one epoch not every expert is used
        outcome = bench("claims_mnist", *arguments, quick=False)
        assert outcome.code == 0, outcome.err
        assert "claims_compression.md and claims_compression.json" in outcome.out
        assert (bench.results / "claims_compression.md").exists()
        findings = json.loads((bench.results / "claims_compression.json").read_text())
        assert {finding["claim"] for finding in findings} == {*range(15, 20)}
        assert {finding["n"] for finding in findings} == {2}
        assert not (bench.results / "claims.json").exists()
        drawn = {path.stem for path in (bench.results / "claims" / "plots").iterdir()}
        assert drawn == set(PRUNING_CLAIM_FIGURES)
        monkeypatch.setattr("mnist_lab.experiments.technique.fit", None)  # would fail if it were called
        assert " 0 of 2 seeds to make" in bench("claims_mnist", *arguments, quick=False).out

    def test_bad_number_of_seeds(self, bench: Bench) -> None:
        bench.expect_user_error("claims_mnist", "--seeds", "0", says="--seeds")

    def test_dark_knowledge_is_written_beside_the_paper(self, bench: Bench) -> None:
        outcome = bench("dark_knowledge_mnist", "--dataset", "digits", "--epochs", "1", "--seeds", "1", quick=False)
        assert outcome.code == 0
        folder = bench.folder / "results" / "digits-dark-knowledge-epochs1"
        (found,) = json.loads((folder / "dark_knowledge.json").read_text())["runs"]
        assert found["errors"].keys() == {"teacher", "labels", "distilled", "distilled-without-3", "bias corrected"}
        assert "paper" in (folder / "dark_knowledge.md").read_text()
        bench.expect_user_error("dark_knowledge_mnist", "--epochs", "0", quick=False, says="--epochs")


class TestSingleScripts:
    def test_moe_options_name_the_model_and_reach_it(self, bench: Bench) -> None:
        options = "--num-experts 3 --top-k 1 --balance cv --capacity-factor 1.0"
        outcome = bench("moe_mnist", *options.split())
        assert outcome.code == 0
        name = "Sparse_MoE-E3-K1-cv-c1-epochs1"
        routing = read_metadata(bench.checkpoints / f"{name}-seed0.safetensors")["architecture"]["routing"]
        assert routing["num_experts"] == 3
        assert "dropped" in outcome.out
        (record,) = load_records(bench.results)
        assert len(record.curves[0]["expert_load"]) == 3
        assert (record.curves[0]["dropped_share"] or 0) > 0
        assert record.expert_by_class is not None
        assert [len(record.expert_by_class), len(record.expert_by_class[0])] == [10, 3]

    def test_static_and_dynamic_int8_of_both_kinds(self, finished_bench: Bench) -> None:
        for model, mode, name in [
            ("ffn", "dynamic", "FFN_PTQ_INT8-dynamic-epochs1"),
            ("student", "dynamic", "KD_FFN_Student_INT8-dynamic-epochs1"),
            ("moe", "static", "Sparse_MoE_PTQ-cal200-epochs1"),
        ]:
            size = ["--calibration-size", "200"] if mode == "static" else []
            outcome = finished_bench("ptq_mnist", "--model", model, "--mode", mode, *size)
            assert outcome.code == 0
            assert "integer products" in outcome.out
            assert (finished_bench.checkpoints / f"{name}-seed0.onnx").is_file()

    def test_bits_follow_from_the_bytes_that_a_file_may_take(self, finished_bench: Bench) -> None:
        for allocation, suffix in (("sensitivity", ""), ("even", "-even")):
            options = ["--mode", "weight-only", "--size-budget", "90", "--allocation", allocation]
            outcome = finished_bench("ptq_mnist", *options)
            assert outcome.code == 0, outcome
            assert "of 90.0 KiB" in outcome.out
            file = finished_bench.checkpoints / f"FFN_baseline_mixed_bits-KiB90{suffix}-epochs1-seed0.onnx"
            assert 80 * 1024 < file.stat().st_size <= 90 * 1024
        few = ["ptq_mnist", "--mode", "weight-only", "--size-budget", "9"]
        finished_bench.expect_user_error(*few, says="in the fewest bits")

    @pytest.mark.skipif(why_missing("torchao") is not None, reason=str(why_missing("torchao")))
    def test_runtimes_asked_for_are_those_of_the_table(self, finished_bench: Bench) -> None:
        outcome = finished_bench("ptq_mnist", "--runtime", "openvino", "torchao")
        assert outcome.code == 0
        int8, fp32 = (
            next(r for r in load_records(finished_bench.results) if r.run_name == f"{name}-epochs1-seed0")
            for name in ("FFN_PTQ_INT8", "FFN_baseline")
        )
        assert set(int8.measurements) == {"openvino", "torchao"}
        # What was measured before is kept, and not in the table that did not ask for it.
        assert set(fp32.measurements) == {"pytorch", "onnxruntime", "openvino"}
        table = outcome.out[outcome.out.index("model   ") :]
        assert "onnxruntime" not in table.partition("same class")[0]
        program = finished_bench.checkpoints / "FFN_PTQ_INT8-epochs1-seed0.safetensors"
        assert int8.measurements["torchao"].file_mb == pytest.approx(program.stat().st_size / 1e6)

    def test_runtime_that_is_missing_is_skipped_with_a_line(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(console, "why_missing", lambda runtime: "no such luck" if runtime == "openvino" else None)
        outcome = bench("baseline_mnist", "--runtime", "openvino", "onnxruntime")
        assert outcome.code == 0
        assert "--runtime openvino is skipped: no such luck" in outcome.out
        (record,) = load_records(bench.results)
        assert set(record.measurements) == {"onnxruntime"}
        bench.expect_user_error("baseline_mnist", "--runtime", "openvino", says="openvino")

    def test_students(self, finished_bench: Bench) -> None:
        assert finished_bench("kd_mnist", "--teacher", "ffn", "--temperature", "10").code == 0
        metadata = read_metadata(finished_bench.checkpoints / "KD_FFN_Student_from_FFN-T10-epochs1-seed0.safetensors")
        assert metadata["config"]["step"]["distillation"] == {"temperature": 10.0, "alpha": 0.7}
        assert metadata["parents"]["teacher"]["model"] == "FFN_baseline-epochs1"

    def test_student_mixture(self, finished_bench: Bench) -> None:
        outcome = finished_bench("kd_mnist", "--student", "moe", "--student-width", "32", "--router-weight", "1")
        assert outcome.code == 0
        assert "share of (image, expert) pairs" in outcome.out
        metadata = read_metadata(finished_bench.checkpoints / "KD_MoE_Student-w32-r1-epochs1-seed0.safetensors")
        assert metadata["parents"]["teacher"]["model"] == "Sparse_MoE-epochs1"
        assert set(metadata["curves"][0]["train_terms"]) >= {"distillation", "router", "experts", "balance"}
        logits_alone = ["--teacher", "ffn", "--router-weight", "0", "--experts-weight", "0"]
        assert finished_bench("kd_mnist", "--student", "moe", *logits_alone).code == 0

    @pytest.mark.parametrize(
        ("arguments", "name", "members"),
        [
            ("--data mixed --num-images 300", "KD_FFN_Student-mixed-n300", ["Sparse_MoE-epochs1-seed0"]),
            (
                "--teacher ensemble --ensemble-size 2",
                "KD_FFN_Student-ensemble2",
                ["Sparse_MoE-epochs1-seed0", "Sparse_MoE-epochs1-seed1"],
            ),
            ("--teacher early-moe", "KD_FFN_Student-early", ["Sparse_MoE_early-epochs1-seed0"]),
            (
                "--teacher wide-ffn",
                "KD_FFN_Student_from_FFN-wide",
                ["../digits-wide-quick/FFN_baseline-epochs1-seed0"],
            ),
        ],
    )
    def test_students_of_made_images_and_of_better_teachers(
        self, finished_bench: Bench, arguments: str, name: str, members: list[str]
    ) -> None:
        outcome = finished_bench("kd_mnist", *arguments.split())
        assert outcome.code == 0, outcome.err
        metadata = read_metadata(finished_bench.checkpoints / f"{name}-epochs1-seed0.safetensors")
        assert [parent["file"] for parent in metadata["parents"].values()] == [f"{own}.safetensors" for own in members]
        assert ("the teacher's classes" in outcome.out) == ("--data" in arguments)

    def test_control_needs_no_teacher(self, bench: Bench) -> None:
        assert bench("kd_mnist", "--no-distillation").code == 0
        metadata = read_metadata(bench.checkpoints / "FFN_Student_no_KD-epochs1-seed0.safetensors")
        assert metadata["parents"] == {}

    def test_threads_reach_the_record(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        threads: list[int] = []
        real_measure = measure.measure_latency

        def spy(*arguments: Any, **options: Any) -> Any:
            threads.append(torch.get_num_threads())
            return real_measure(*arguments, **options)

        monkeypatch.setattr(measure, "measure_latency", spy)
        monkeypatch.setattr("mnist_lab.command.options.usable_cpus", lambda: 2)
        assert bench("baseline_mnist", "--threads", "2").code == 0
        assert set(threads) == {2}
        (record,) = load_records(bench.results)
        assert {measurement.threads for measurement in record.measurements.values()} == {2}

    def test_test_split_is_read_once_and_after_the_training(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        real_fit, real_digits = training.fit, data._digits

        def spy_fit(*arguments: Any, **options: Any) -> Any:
            events.append("fit")
            return real_fit(*arguments, **options)

        def spy_digits(split: Any) -> Any:
            events.append(split)
            return real_digits(split)

        monkeypatch.setattr("mnist_lab.experiments.technique.fit", spy_fit)
        monkeypatch.setattr(data, "_digits", spy_digits)
        assert bench("baseline_mnist").code == 0
        assert events == ["train", "fit", "test"]

    def test_as_a_command(self, tmp_path: Path) -> None:
        command = [sys.executable, str(ROOT / "baseline_mnist.py"), *QUICK]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "FFN_baseline-epochs1" in done.stdout

    @pytest.mark.parametrize("script", OPTIONS)
    def test_help_gives_every_option_with_default_and_no_none_to_choose(self, bench: Bench, script: str) -> None:
        outcome = bench(script, "--help", quick=False)
        assert outcome.code == 0
        fields = dataclasses.fields(getattr(importlib.import_module(script), OPTIONS[script]))
        for field in fields:
            if field.name not in GROUPS:
                assert f"-{field.name.replace('_', '-')}" in outcome.out
        assert outcome.out.count("(default:") + outcome.out.count("(optional)") >= len(fields) - 1
        assert "{None" not in outcome.out
        assert "None," not in outcome.out


class TestEndings:
    def test_interrupt_is_130_and_keeps_what_was_there(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(TrainFFN, "make", interrupt)
        outcome = bench("baseline_mnist")
        assert outcome.code == 130
        assert bench.files() == {}

    def test_diverging_loss_is_1_names_the_step_and_keeps_the_checkpoint(
        self, finished_bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = finished_bench.files()

        def diverge(*_: object, **__: object) -> None:
            raise TrainingDiverged("the loss is nan at step 3 of epoch 1")

        monkeypatch.setattr("mnist_lab.experiments.technique.fit", diverge)
        outcome = finished_bench("baseline_mnist")
        assert outcome.code == 1
        assert "step 3" in outcome.err
        assert "Traceback" not in outcome.err
        assert finished_bench.files() == before


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ("moe_mnist --top-k 5", "--top-k 5"),
            ("moe_mnist --num-experts 0", "--num-experts 0"),
            ("moe_mnist --capacity-factor nan", "--capacity-factor nan"),
            ("moe_mnist --balance-weight=-1", "--balance-weight"),
            ("moe_mnist --balance best", "best"),
            ("baseline_mnist --epochs 0", "--epochs 0"),
            ("baseline_mnist --batch-size=-5", "--batch-size"),
            ("baseline_mnist --threads 0", "--threads"),
            ("baseline_mnist --threads 100000", "--threads"),
            ("baseline_mnist --seed=-1", "--seed"),
            ("baseline_mnist --device warp", "--device warp"),
            ("baseline_mnist --device meta", "--device meta"),
            ("baseline_mnist --preset huge", "huge"),
            ("baseline_mnist --dataset cifar", "cifar"),
            ("baseline_mnist --dataset None", "None"),
            ("baseline_mnist --data-dir nowhere --dataset mnist", "nowhere"),
            ("kd_mnist --temperature 0", "--temperature"),
            ("kd_mnist --temperature inf", "--temperature"),
            ("kd_mnist --temperature 1e200", "--temperature"),
            ("baseline_mnist --batch-size 100000000000000000000", "--batch-size"),
            ("kd_mnist --alpha 1.5", "--alpha"),
            ("kd_mnist --windows 8x5", "--windows 8x5"),
            ("kd_mnist --no-distillation --windows 8x29s1", "--windows 8x29s1"),
            ("kd_mnist --no-distillation --pool 3", "--pool 3"),
            ("ptq_mnist --calibration-size 0", "--calibration-size"),
            ("ptq_mnist --calibration-size 50 --model moe", "for --mode static"),
            ("ptq_mnist --calibration-size 50 --mode dynamic", "for --mode static"),
            ("kd_mnist --no-distillation --temperature 5", "--temperature"),
            ("kd_mnist --no-distillation --teacher ffn", "--teacher"),
            ("kd_mnist --student moe --teacher ffn", "--experts-weight 0"),
            ("kd_mnist --student moe --no-distillation", "--no-distillation trains"),
            ("kd_mnist --student moe --student-experts 0", "--student-experts 0"),
            ("kd_mnist --student moe --student-width 30", "--student-width 30"),
            ("kd_mnist --student moe --router-weight=-1", "--router-weight"),
            ("kd_mnist --student moe --experts-weight nan", "--experts-weight nan"),
            ("kd_mnist --student-experts 2", "--student-experts"),
            ("kd_mnist --router-weight 0", "--router-weight"),
            ("kd_mnist --no-distillation --data noise", "--data noise"),
            ("kd_mnist --data mixed --alpha 0.5", "--data mixed"),
            ("kd_mnist --data words", "words"),
            ("kd_mnist --num-images 50", "--data"),
            ("kd_mnist --data noise --num-images 0", "--num-images 0"),
            ("kd_mnist --data digits", "--data true"),
            ("kd_mnist --teacher committee", "committee"),
            ("kd_mnist --ensemble-size 2", "--teacher ensemble"),
            ("kd_mnist --teacher ensemble --ensemble-size 1", "--ensemble-size 1"),
            ("kd_mnist --teacher ensemble --seed 4294967295", "--ensemble-size"),
            ("kd_mnist --teacher wide-moe --preset wide", "--preset wide"),
            ("baseline_mnist --dataset digits --data-dir .", "--data-dir"),
            ("ptq_mnist --model bert", "bert"),
            ("ptq_mnist --runtime pytorch", "onnxruntime"),
            ("baseline_mnist --runtime torchao", "onnxruntime"),
            ("ptq_mnist --bits 2", "drop --bits"),
            ("ptq_mnist --mode weight-only --group-size 48", "--group-size 48"),
            ("ptq_mnist --mode weight-only --bits 5", "--bits"),
            ("ptq_mnist --mode weight-only --calibration-size 5", "for --mode static"),
            ("ptq_mnist --mode weight-only --size-budget 0", "--size-budget 0"),
            ("ptq_mnist --mode weight-only --size-budget nan", "--size-budget nan"),
            ("ptq_mnist --mode weight-only --size-budget 90 --bits 2", "drop --bits"),
            ("ptq_mnist --mode weight-only --size-budget 90 --group-size 64", "--group-size"),
            ("ptq_mnist --size-budget 90", "static mode stores 8 bits"),
            ("ptq_mnist --mode weight-only --allocation even", "--allocation even"),
            ("baseline_mnist --runtime tensorrt", "tensorrt"),
            ("claims_mnist --runtime pytorch", "onnxruntime"),
            ("claims_mnist --suite nonsense", "nonsense"),
            ("claims_mnist --suite compression --runtime pytorch", "onnxruntime"),
            ("claims_mnist --suite transfer --runtime pytorch", "onnxruntime"),
            ("run_all_experiments --seeds 0", "--seeds"),
            ("run_all_experiments --seeds 1000000000", "--seeds"),
            ("run_all_experiments --seed 4294967295 --seeds 2", "--seeds 2"),
            ("claims_mnist --seed 4294967295 --seeds 2", "--seeds 2"),
            ("run_all_experiments --mode guess", "guess"),
        ],
    )
    def test_value_out_of_range_is_named(self, bench: Bench, arguments: str, says: str) -> None:
        bench.expect_user_error(*arguments.split(), says=says)

    def test_missing_parent_names_the_script_that_makes_it(self, bench: Bench) -> None:
        bench.expect_user_error("ptq_mnist", says="baseline_mnist.py")
        bench.expect_user_error("kd_mnist", says="moe_mnist.py")
        bench.expect_user_error("ptq_mnist", "--model", "student", says="kd_mnist.py")

    def test_stale_source_or_teacher_is_not_used_without_a_word(self, finished_bench: Bench) -> None:
        moe, other = (finished_bench.checkpoints / f"Sparse_MoE-epochs1-seed{seed}.safetensors" for seed in (0, 1))
        other.unlink()
        finished_bench.expect_user_error("kd_mnist", "--seed", "1", says="missing")
        student = finished_bench.checkpoints / "KD_FFN_Student-epochs1-seed1.safetensors"
        assert student.exists()
        finished_bench.expect_user_error(
            "ptq_mnist", "--model", "student", "--seed", "1", says="stale: Sparse_MoE-epochs1 is missing"
        )
        assert moe.exists()

    def test_calibration_beyond_the_training_set(self, finished_bench: Bench) -> None:
        finished_bench.expect_user_error("ptq_mnist", "--calibration-size", "5000", says="5000")

    @pytest.mark.parametrize("content", [b"somebody's file", None], ids=["foreign", "another model"])
    @pytest.mark.parametrize(
        ("script", "file"),
        [
            ("baseline_mnist", "FFN_baseline-epochs1-seed0.safetensors"),
            ("baseline_mnist", "FFN_baseline-epochs1-seed0.onnx"),
            ("kd_mnist", "KD_FFN_Student-epochs1-seed0.safetensors"),
            ("ptq_mnist", "FFN_PTQ_INT8-epochs1-seed0.onnx"),
        ],
    )
    def test_file_that_is_not_the_rows_own_is_not_overwritten(
        self, finished_bench: Bench, script: str, file: str, content: bytes | None
    ) -> None:
        path = finished_bench.checkpoints / file
        path.write_bytes(
            content or (finished_bench.checkpoints / f"Sparse_MoE-epochs1-seed0{path.suffix}").read_bytes()
        )
        finished_bench.expect_user_error(script, says=path.name)

    @pytest.mark.parametrize("damage", ["truncated", "foreign"])
    def test_broken_checkpoint_is_named_and_kept(self, finished_bench: Bench, damage: str) -> None:
        path = finished_bench.checkpoints / "FFN_baseline-epochs1-seed0.safetensors"
        path.write_bytes(path.read_bytes()[:1000] if damage == "truncated" else b"not a checkpoint at all")
        for arguments in (["ptq_mnist"], ["kd_mnist", "--teacher", "ffn"], ["run_all_experiments", "--mode", "load"]):
            finished_bench.expect_user_error(*arguments, says=path.name)

    def test_broken_artifact_is_named_and_kept(self, finished_bench: Bench) -> None:
        path = finished_bench.checkpoints / "FFN_PTQ_INT8-epochs1-seed0.onnx"
        path.write_bytes(path.read_bytes()[:1000])
        finished_bench.expect_user_error("run_all_experiments", "--mode", "load", says=path.name)

    @pytest.mark.parametrize(
        ("other", "folder", "says"),
        [
            (["--preset", "wide"], "digits-wide-quick", "compact"),
            (["--recipe", "best"], "digits-compact-best", "quick"),
        ],
    )
    def test_checkpoint_of_another_preset_or_recipe_is_refused(
        self, finished_bench: Bench, other: list[str], folder: str, says: str
    ) -> None:
        shutil.copytree(finished_bench.checkpoints, finished_bench.folder / "checkpoints" / folder)
        for script in (["ptq_mnist"], ["kd_mnist"], ["run_all_experiments", "--mode", "load"]):
            finished_bench.expect_user_error(*script, *other, says=says)

    def test_checkpoint_of_another_data_set_is_refused(self, finished_bench: Bench, mnist_dir: Path) -> None:
        shutil.copytree(finished_bench.checkpoints, finished_bench.folder / "checkpoints" / "mnist-compact-quick")
        arguments = ["ptq_mnist", "--dataset", "mnist", "--data-dir", str(mnist_dir)]
        finished_bench.expect_user_error(*arguments, says="digits")

    @pytest.mark.parametrize("option", ["--checkpoints", "--results"])
    def test_folder_that_cannot_be_written(self, bench: Bench, option: str) -> None:
        (bench.folder / "file").write_text("")
        bench.expect_user_error("baseline_mnist", option, "file/inside", says="cannot write")


class TestWithoutNetwork:
    def test_run_says_so_twice_and_files_it_under_digits(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(_: sources.DatasetName) -> Path:
            raise OSError("no network")

        monkeypatch.setattr(data, "download", unreachable)
        outcome = bench("baseline_mnist", "--recipe", "quick", "--epochs", "1", quick=False)
        assert outcome.code == 0
        assert outcome.out.count("NOTE: MNIST is not here") == 2
        assert [path.name for path in (bench.folder / "results").iterdir()] == [FOLDER]
        bench.expect_user_error("baseline_mnist", "--dataset", "mnist", quick=False, says="cannot be downloaded")


def test_mnist_end_to_end(bench: Bench, mnist_dir: Path) -> None:
    arguments = ["--data-dir", str(mnist_dir), "--recipe", "quick", "--epochs", "1"]
    assert bench("baseline_mnist", *arguments, quick=False).code == 0
    assert bench("ptq_mnist", *arguments, quick=False).code == 0
    fp32, int8 = sorted(load_records(bench.folder / "results" / "mnist-compact-quick"), key=lambda r: r.precision)
    assert fp32.measurements["onnxruntime"].test_acc > 0.95
    assert abs(int8.measurements["onnxruntime"].test_acc - fp32.measurements["onnxruntime"].test_acc) < 0.001
    assert int8.proof is not None
    assert int8.measurements["onnxruntime"].same_class >= 0.997
    assert {fp32.row, int8.row} <= {row.name for row in MODELS}
