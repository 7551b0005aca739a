"""`qat_mnist.py`, and what `ptq_mnist.py` has for few bits, as the command line runs them."""

import shutil
from pathlib import Path

import pytest
from test_scripts import QUICK, Bench, bench, run  # noqa: F401  a fixture

from mnist_lab.report.records import Record, load_record

pytestmark = pytest.mark.slow
WEIGHT_ONLY = ("--mode", "weight-only")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two models that others are made of."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for script in ("baseline_mnist", "moe_mnist"):
            assert run(script, QUICK, monkeypatch) == 0
    return folder


@pytest.fixture
def trained_bench(bench: Bench, trained: Path) -> Bench:  # noqa: F811
    shutil.copytree(trained, bench.folder, dirs_exist_ok=True)
    return bench


def succeed(bench: Bench, *arguments: str) -> str:  # noqa: F811
    outcome = bench(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def record_of(bench: Bench, name: str) -> Record:  # noqa: F811
    return load_record(bench.results / "runs" / f"{name}-epochs1-seed0.json")


def test_a_model_learns_in_4_bits_where_nothing_is_said(trained_bench: Bench) -> None:
    out = succeed(trained_bench, "qat_mnist")
    assert "weights: 234,752 of 4 bits; learned the task over 1 epochs" in out
    assert "weights of products: 3 of 4 bits; multiplied: 3 as INT8; in float: none" in out
    record = record_of(trained_bench, "FFN_baseline_QAT")
    assert (record.precision, record.technique, record.original) == ("INT4", "qat", "FFN_baseline-epochs1")
    whole, rounded = (
        trained_bench.checkpoints / f"{name}-epochs1-seed0.onnx" for name in ("FFN_baseline", "FFN_baseline_QAT")
    )
    assert rounded.stat().st_size < 0.14 * whole.stat().st_size
    before = trained_bench.checkpoints / "FFN_baseline_QAT_FP32-epochs1-seed0.safetensors"
    content = before.read_bytes()
    succeed(trained_bench, "qat_mnist")
    assert before.read_bytes() == content  # the same seed, the same bits


@pytest.mark.parametrize(
    ("arguments", "name", "precision", "says"),
    [
        (
            "--model moe --bits 1 --group-size 64 --router-bits 2 --activation-bits 4 --teacher self",
            "Sparse_MoE_QAT-b1-g64-router2-a4-self",
            "INT1",
            "activations: 7 in 4 bits; to and from experts 512 bytes an image",
        ),
        ("--bits ternary --start scratch", "FFN_baseline_QAT-bternary-scratch", "ternary", "2 of three levels"),
        ("--bits 2 --learn layers", "FFN_baseline_layer_wise-b2", "INT2", "learned their layers' outputs before"),
        ("--bits 8 --activation-bits 8 --finetune-epochs 2", "FFN_baseline_QAT-b8-a8-ft2", "INT8", "over 2 epochs"),
        ("--model moe --bits 3 --learn layers", "Sparse_MoE_layer_wise-b3", "INT3", "same class as Sparse_MoE"),
    ],
)
def test_every_option_goes_all_the_way(
    trained_bench: Bench, arguments: str, name: str, precision: str, says: str
) -> None:
    assert says in succeed(trained_bench, "qat_mnist", *arguments.split())
    assert record_of(trained_bench, name).precision == precision


def test_ptq_rounds_router_and_activations_and_takes_a_scheme(trained_bench: Bench) -> None:
    options = "--model moe --bits 3 --scheme affine --router-bits 8 --activation-bits 8 --method nearest".split()
    out = succeed(trained_bench, "ptq_mnist", *WEIGHT_ONLY, *options)
    assert "9 of 3 bits" in out
    assert "activations: 7 in 8 bits; to and from experts 1,024 bytes an image" in out
    record = record_of(trained_bench, "Sparse_MoE_weight_only-b3-nearest-affine-router8-a8")
    assert record.against_original is not None
    assert 0 <= record.against_original["rerouted"] <= 1


@pytest.mark.parametrize(
    ("bits", "name", "precision"), [("8", "Sparse_MoE_fused-b8", "INT8"), ("4", "Sparse_MoE_fused", "INT4")]
)
def test_ptq_makes_one_operator_of_the_experts(trained_bench: Bench, bits: str, name: str, precision: str) -> None:
    out = succeed(trained_bench, "ptq_mnist", *f"--model moe --mode fused --bits {bits}".split())
    assert f"experts: one operator, weights of {bits} bits, rows of 8; integer products: 2" in out
    record = record_of(trained_bench, name)
    assert (record.precision, record.technique, [*record.measurements]) == (
        precision,
        "moe + fused ptq",
        ["onnxruntime"],
    )
    assert record.against_original is not None
    assert 0 <= record.against_original["rerouted"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("qat_mnist --bits 5", "--bits"),
        ("qat_mnist --bits None", "--bits"),
        ("qat_mnist --group-size 48", "--group-size 48"),
        ("qat_mnist --group-size all", "--group-size"),
        ("qat_mnist --router-bits 4", "--router-bits 4: ffn has no router"),
        ("qat_mnist --model student --router-bits 4", "student has no router"),
        ("qat_mnist --model moe --router-bits 3", "--router-bits"),
        ("qat_mnist --activation-bits 2", "--activation-bits"),
        ("qat_mnist --learn layers --start scratch", "--learn layers"),
        ("qat_mnist --learn layers --activation-bits 8", "--learn layers"),
        ("qat_mnist --learn layers --teacher self", "--learn layers"),
        ("qat_mnist --start scratch --finetune-epochs 3", "--start scratch"),
        ("qat_mnist --finetune-epochs -1", "--finetune-epochs"),
        ("qat_mnist --model bert", "bert"),
        ("qat_mnist --runtime pytorch", "onnxruntime"),
        ("qat_mnist", "baseline_mnist.py"),
        ("qat_mnist --model moe", "moe_mnist.py"),
        ("ptq_mnist --mode weight-only --bits ternary", "invalid choice 'ternary' for argument '--bits'"),
        ("ptq_mnist --mode weight-only --bits 1", "invalid choice '1' for argument '--bits'"),
        ("ptq_mnist --mode weight-only --router-bits 4", "--router-bits 4: ffn has no router"),
        ("ptq_mnist --mode weight-only --activation-bits 16", "--activation-bits"),
        ("ptq_mnist --bits 4 --group-size 64", "weight-only"),
        ("ptq_mnist --method nearest", "weight-only"),
        ("ptq_mnist --scheme affine", "weight-only"),
        ("ptq_mnist --mode dynamic --activation-bits 8", "weight-only"),
        ("ptq_mnist --model moe --router-bits 4", "weight-only"),
        ("ptq_mnist --mode fused", "ffn has none"),
        ("ptq_mnist --mode fused --model student --bits 8", "student has none"),
        ("ptq_mnist --mode fused --model moe --bits 2", "--bits 2: --mode fused takes 8 or 4"),
        ("ptq_mnist --mode fused --model moe --bits 3", "--bits 3: --mode fused takes 8 or 4"),
        ("ptq_mnist --mode fused --model moe --group-size 64", "no options but --bits"),
        ("ptq_mnist --mode fused --model moe --first-layer-bits 8", "no options but --bits"),
        ("ptq_mnist --mode fused --model moe --scheme affine", "no options but --bits"),
        ("ptq_mnist --mode fused --model moe --method nearest", "no options but --bits"),
        ("ptq_mnist --mode fused --model moe --router-bits 4", "no options but --bits"),
        ("ptq_mnist --mode fused --model moe --activation-bits 8", "no options but --bits"),
        ("ptq_mnist --mode fused --model moe --size-budget 300", "no options but --bits"),
        ("ptq_mnist --mode weight-only --bits 2 --first-layer-bits 1", "invalid choice"),
        ("ptq_mnist --bits 4", "static mode stores 8 bits: drop --bits"),  # though 4 is what the other mode takes
        ("ptq_mnist --mode weight-only --size-budget 90 --bits 4", "choose the bits"),
        ("ptq_mnist --mode weight-only --mean-bits 0", "--mean-bits 0 must lie between 2 and 8"),
        ("qat_mnist --bits 8 --first-layer-bits 8", "--first-layer-bits 8 is"),
        ("ptq_mnist --mode fused --model moe --calibration-size 50", "for --mode static"),
        ("ptq_mnist --mode fused --model moe --runtime pytorch", "onnxruntime"),
        ("ptq_mnist --target-cpu mine", "--target-cpu"),
        ("ptq_mnist --mode weight-only --target-cpu any", "--target-cpu any is for --mode static and dynamic"),
        ("ptq_mnist --mode fused --model moe --target-cpu any", "--target-cpu any is for --mode static and dynamic"),
    ],
)
def test_bad_input_ends_with_exit_code_2(bench: Bench, arguments: str, says: str) -> None:  # noqa: F811
    bench.expect_user_error(*arguments.split(), says=says)
