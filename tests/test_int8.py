import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from tiny import make_dataset, spec

import ptq_mnist
from mnist_lab.compress import int8 as q
from mnist_lab.compress.bfloat16 import BFloat16
from mnist_lab.compress.float32 import Float32
from mnist_lab.compress.int8 import Calibration, CalibrationMethod, DynamicInt8, Mode, StaticInt8
from mnist_lab.data import Dataset
from mnist_lab.deploy.artifacts import artifact_bytes, read_onnx, read_onnx_metadata, save_onnx
from mnist_lab.deploy.inside import choose_experts
from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.experiments.technique import Form, Work
from mnist_lab.measure import Array
from mnist_lab.models import PRESETS, build_model
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.runtimes import FLOAT_PRODUCTS
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession
from mnist_lab.training import find_recipe

pytestmark = pytest.mark.slow

NUM_LAYERS = {"ffn": 3, "moe-sparse": 10, "moe-dense": 4, "moe-top1": 10}
METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)
FORMS: dict[str, Form] = {"fp32": Float32(), "bf16": BFloat16(), "dynamic": DynamicInt8()}
FORMS |= {method: StaticInt8(Calibration(60, method)) for method in METHODS}
OUTPUTS = [*(f"expert{expert}.out" for expert in range(6)), "sorted_outputs"]
MODELS = {"ffn": None, "sparse": RoutingConfig(3, 1), "dense": RoutingConfig(2, 2)}  # of 60 images few visit an expert


@pytest.fixture(params=NUM_LAYERS)
def fp32(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    preset = PRESETS["compact"]
    routing = RoutingConfig(top_k=1 if request.param == "moe-top1" else 2)
    data = spec(0.18, 0.18)
    model = build_model(preset.ffn(data) if request.param == "ffn" else preset.moe(data, routing))
    path = tmp_path / f"{request.param}.onnx"
    write_onnx(model.eval(), path, {"model": "x"}, layout="dense" if request.param == "moe-dense" else "sparse")
    return path


def decibels(reference: Array, found: Array) -> float:
    """Signal to noise."""
    return float(10 * np.log10(np.square(reference).sum() / np.square(reference - found).sum()))


def convert(fp32: Path, dataset: Dataset, mode: Mode) -> Path:
    output = fp32.with_name(f"{fp32.stem}-{mode}.onnx")
    q.quantize(
        fp32,
        output,
        mode=mode,
        calibration=dataset.train.pixels.numpy(),
        keep_float=FLOAT_PRODUCTS,
        reduced_range=q.needs_reduced_range(),
        metadata={"model": "x", "config": {"mode": mode}},
    )
    return output


class TestFormulas:
    def test_affine_is_torchs(self) -> None:
        r = torch.linspace(-1.3, 2.9, 1000)
        scale, zero_point = q.affine_parameters(-1.3, 2.9)
        expected = torch.fake_quantize_per_tensor_affine(r, scale, zero_point, 0, 255)
        restored = q.affine_dequantize(q.affine_quantize(r.numpy(), scale, zero_point), scale, zero_point)
        assert np.allclose(restored, expected.numpy(), atol=1e-6)
        assert np.abs(restored - r.numpy()).max() <= scale / 2 + 1e-6

    @pytest.mark.parametrize(("r_min", "r_max"), [(-1.3, 2.9), (0.5, 2.0), (-2.0, -0.5), (0.0, 1.0), (0.0, 0.0)])
    def test_zero_is_exact_in_every_range(self, r_min: float, r_max: float) -> None:
        scale, zero_point = q.affine_parameters(r_min, r_max)
        assert scale > 0
        assert 0 <= zero_point <= 255
        zero = np.zeros(1, np.float32)
        assert q.affine_dequantize(q.affine_quantize(zero, scale, zero_point), scale, zero_point) == 0

    def test_affine_clips_outside_the_range(self) -> None:
        scale, zero_point = q.affine_parameters(0.0, 1.0)
        assert q.affine_quantize(np.array([-5.0, 9.0], np.float32), scale, zero_point).tolist() == [0, 255]

    def test_raw_pixels_lose_nothing(self) -> None:
        levels = (np.arange(256) / 255).astype(np.float32)
        scale, zero_point = q.affine_parameters(0.0, 1.0)
        assert zero_point == 0
        assert np.array_equal(q.affine_quantize(levels, scale, zero_point), np.arange(256))

    def test_absmax_uses_the_whole_range_and_keeps_zero(self) -> None:
        values, scale = q.absmax_quantize(np.array([-2.0, 0.0, 0.5, 1.0], np.float32))
        assert values.tolist() == [-127, 0, 32, 64]
        assert scale.item() == pytest.approx(2 / 127)

    def test_absmax_of_zeros_does_not_divide_by_zero(self) -> None:
        values, scale = q.absmax_quantize(np.zeros((3, 2), np.float32), axis=1)
        assert not values.any()
        assert np.isfinite(scale).all()

    def test_per_channel_scales_are_per_channel(self) -> None:
        r = np.array([[1.0, 10.0], [-0.5, 20.0]], np.float32)
        values, scale = q.absmax_quantize(r, axis=1)
        assert scale.shape == (1, 2)
        assert values[0, 0] == 127
        assert values[1, 1] == 127


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_engine_runs_every_layer_in_integers(fp32: Path, toy_dataset: Dataset, mode: Mode) -> None:
    proof = q.prove_integer(convert(fp32, toy_dataset, mode), onnx.load(fp32), keep_float=FLOAT_PRODUCTS)
    assert sum(proof.integer_products.values()) == NUM_LAYERS[fp32.stem]
    assert proof.float_products == ([] if fp32.stem == "ffn" else ["combine", "router"])


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_int8_is_a_quarter_and_close(fp32: Path, toy_dataset: Dataset, mode: Mode) -> None:
    output = convert(fp32, toy_dataset, mode)
    assert artifact_bytes(output) <= 0.28 * artifact_bytes(fp32)
    assert output.stat().st_size <= 0.28 * fp32.stat().st_size
    pixels = toy_dataset.validation.pixels.numpy()
    reference, quantized = (OnnxRuntimeSession(path, threads=1).predict(pixels) for path in (fp32, output))
    # One image on another route than in float is wrong by all that its one expert says.
    assert decibels(reference, quantized) > (15 if fp32.stem == "moe-top1" else 20)
    assert read_onnx_metadata(output)["config"] == {"mode": mode}


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_engines_weights_are_the_textbooks(fp32: Path, toy_dataset: Dataset, mode: Mode) -> None:
    output = convert(fp32, toy_dataset, mode)
    constants = {c.name: numpy_helper.to_array(c) for c in onnx.load(output).graph.initializer}
    originals = {c.name: numpy_helper.to_array(c) for c in onnx.load(fp32).graph.initializer}
    weights = [name for name in originals if name.endswith(".weight")]
    assert len(weights) == NUM_LAYERS[fp32.stem]
    for name in weights:
        # The engine stores weights (inputs, outputs), of 7 bits with one scale per output.
        bits: Any = {"q_max": 64, "axis": 1} if q.needs_reduced_range() else {}
        expected, scale = q.absmax_quantize(originals[name], **bits)
        actual = constants[f"{name}_quantized"]
        assert actual.dtype == np.int8
        np.testing.assert_allclose(constants[f"{name}_scale"].ravel(), scale.ravel(), rtol=1e-5)
        # Where r/S lies on the half between two integers, float rounding may go either way.
        assert (actual != expected).mean() < 1e-3
        assert np.abs(actual.astype(int) - expected).max() <= 1


def test_layer_left_in_float_is_found(fp32: Path, toy_dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(WrongPrecision, match="integer products"):
        q.prove_integer(fp32, onnx.load(fp32), keep_float=FLOAT_PRODUCTS)
    output = tmp_path / "partly.onnx"
    q.quantize(
        fp32,
        output,
        mode="static",
        calibration=toy_dataset.train.pixels.numpy(),
        keep_float=[*FLOAT_PRODUCTS, "logits"],
        reduced_range=q.needs_reduced_range(),
        metadata={"model": "x"},
    )
    with pytest.raises(WrongPrecision, match="logits"):
        q.prove_integer(output, onnx.load(fp32), keep_float=FLOAT_PRODUCTS)


def test_integer_router_is_found(tmp_path: Path) -> None:
    fp32 = tmp_path / "moe.onnx"
    write_onnx(build_model(PRESETS["compact"].moe(spec(0.18, 0.18))), fp32, {"model": "x"})
    output = tmp_path / "int8.onnx"
    q.quantize(fp32, output, mode="dynamic", keep_float=["combine"], reduced_range=False, metadata={"model": "x"})
    with pytest.raises(WrongPrecision, match="router"):
        q.prove_integer(output, onnx.load(fp32), keep_float=FLOAT_PRODUCTS)


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_histogram_methods_calibrate_experts_of_unequal_load(
    toy_dataset: Dataset, tmp_path: Path, method: q.CalibrationMethod
) -> None:
    fp32, output = tmp_path / "moe.onnx", tmp_path / "int8.onnx"
    write_onnx(build_model(PRESETS["compact"].moe(spec(0.18, 0.18))), fp32, {})
    calibration = toy_dataset.train.pixels.numpy()
    assert len(calibration) > q.CALIBRATION_BATCH
    minmax = tmp_path / "minmax.onnx"
    for path, how in ((output, method), (minmax, "minmax")):
        q.quantize(
            fp32,
            path,
            mode="static",
            calibration=calibration,
            method=how,
            keep_float=FLOAT_PRODUCTS,
            reduced_range=False,
            metadata={},
        )
    pixels = toy_dataset.validation.pixels.numpy()
    reference, clipped, whole = (OnnxRuntimeSession(path, threads=1).predict(pixels) for path in (fp32, output, minmax))
    assert np.square(reference - clipped).sum() < 0.1 * np.square(reference).sum()
    assert not np.array_equal(clipped, whole)


def test_calibration_size_is_checked() -> None:
    with pytest.raises(UserError, match="--calibration-size 0"):
        q.Calibration(calibration_size=0)


def test_calibration_size_beyond_the_training_images_is_the_users_error_before_any_work(tmp_path: Path) -> None:
    folders: Any = {"dataset": "digits", "checkpoints": tmp_path / "c", "results": tmp_path / "r"}
    with pytest.raises(UserError, match="--calibration-size 2000 is more than the 1,257 training images"):
        ptq_mnist.main(ptq_mnist.PTQOptions(calibration=Calibration(2000), **folders))
    with pytest.raises(UserError, match="FFN_baseline-seed0 is needed first"):
        ptq_mnist.main(ptq_mnist.PTQOptions(calibration=Calibration(1257), **folders))


def make_work(dataset: Dataset) -> Work:
    recipe = find_recipe("quick", "compact")
    return Work(dataset, PRESETS["compact"], recipe, seed=0, device="cpu", name="x")


def write_static(routing: RoutingConfig | None, dataset: Dataset, file: Path, calibration: Calibration) -> str:
    """Write an untrained model of this seed; what its proof says."""
    work, form = make_work(dataset), StaticInt8(calibration)
    preset = PRESETS["compact"]
    model = work.build(preset.ffn(dataset.spec) if routing is None else preset.moe(dataset.spec, routing)).eval()
    form.write(model, file, work, {"model": "x"})
    text: str = form.prove(model, file)["text"]
    return text


def test_fewer_images_than_asked_for_are_said(toy_dataset: Dataset, tmp_path: Path) -> None:
    assert "calibrated" not in write_static(None, toy_dataset, tmp_path / "a.onnx", Calibration(300))
    said = write_static(None, toy_dataset, tmp_path / "b.onnx", Calibration(1000))
    assert said.endswith("; calibrated on 300 images, all that there are")
    assert read_onnx_metadata(tmp_path / "b.onnx")["calibration"]["num_images"] == 300


def constants(file: Path) -> dict[str, npt.NDArray[Any]]:
    return {constant.name: numpy_helper.to_array(constant) for constant in onnx.load(file).graph.initializer}


class TestRareExperts:
    """An expert that no calibration image visits, and images that visit it."""

    @pytest.fixture
    def fp32(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        model = build_model(PRESETS["compact"].moe(spec(0.18, 0.18), RoutingConfig(num_experts=6)))
        torch.nn.init.normal_(model.get_parameter("experts.bias_in"))
        write_onnx(model.eval(), tmp_path / "fp32.onnx", {"model": "x"})
        return tmp_path / "fp32.onnx"

    def split(self, fp32: Path) -> tuple[int, Array, Array]:
        """The expert, the images without it and those with it."""
        pixels = make_dataset(num_train=600).train.pixels.numpy()
        chosen = choose_experts(fp32, pixels)
        expert = int(np.argsort(np.bincount(chosen.flatten(), minlength=6))[2])
        visits = (chosen == expert).any(axis=1)
        assert visits.sum() > 100
        return expert, pixels[~visits], pixels[visits]

    def convert(self, fp32: Path, name: str, calibration: Any, method: CalibrationMethod = "minmax") -> Path:
        output = fp32.with_name(f"{name}.onnx")
        how: Any = {"mode": "static", "method": method, "keep_float": FLOAT_PRODUCTS, "reduced_range": False}
        q.quantize(fp32, output, calibration=calibration, metadata={"model": "x"}, **how)
        return output

    @pytest.mark.parametrize("method", METHODS)
    def test_rows_that_come_later_are_near_float(self, fp32: Path, method: CalibrationMethod) -> None:
        expert, without, visiting = self.split(fp32)
        with warnings.catch_warnings(action="error"):
            output = self.convert(fp32, "int8", without, method)
        scales = {name: value for name, value in constants(output).items() if name.endswith("_scale")}
        assert not any(value.ndim == 0 and value == 1 for value in scales.values())
        on_their_routes = (choose_experts(fp32, visiting) == choose_experts(output, visiting)).all(axis=1)
        images = visiting[on_their_routes]
        float_logits, logits = (OnnxRuntimeSession(path, threads=1).predict(images) for path in (fp32, output))
        assert decibels(float_logits, logits) > 20  # 9 with a scale of 1
        assert read_onnx_metadata(output)["calibration"]["rows_of_rare_experts"][str(expert)] == 0

    def test_outputs_that_outdo_all_others_are_not_cut(self, fp32: Path) -> None:
        expert, without, visiting = self.split(fp32)
        model = read_onnx(fp32)
        for constant in model.graph.initializer:
            if constant.name.startswith(f"expert{expert}.out"):
                constant.raw_data = (10 * numpy_helper.to_array(constant)).tobytes()
        save_onnx(model, fp32, {"model": "x"})
        output = self.convert(fp32, "int8", without)
        on_their_routes = (choose_experts(fp32, visiting) == choose_experts(output, visiting)).all(axis=1)
        images = visiting[on_their_routes]
        float_logits, logits = (OnnxRuntimeSession(path, threads=1).predict(images) for path in (fp32, output))
        assert decibels(float_logits, logits) > 20

    def test_ranges_that_do_not_depend_on_it_stay(self, fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expert, without, _ = self.split(fp32)
        rare = q.rare_experts(fp32, without)
        assert rare[expert] == 0
        mended = constants(self.convert(fp32, "mended", without))
        monkeypatch.setattr(q, "MIN_ROWS", 0)
        as_before = constants(self.convert(fp32, "before", without))
        changed = {name for name in mended if not np.array_equal(mended[name], as_before[name])}
        assert f"expert{expert}.out_scale" in changed
        # All experts' outputs share a range, and what is mixed of them, and the bias that adds to it, follow.
        outputs = {f"{name}_{part}" for name in OUTPUTS for part in ("scale", "zero_point")}
        mixed = {"mixed", "logits"} | {f"expert{number}" for number in rare}
        assert {name.partition(".")[0] for name in changed - outputs} <= mixed

    def test_where_all_experts_see_enough_nothing_changes(self, fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pixels = make_dataset(num_train=2000).train.pixels.numpy()
        assert q.rare_experts(fp32, pixels) == {}
        mended = self.convert(fp32, "mended", pixels).read_bytes()
        monkeypatch.setattr(q, "MIN_ROWS", 0)
        assert self.convert(fp32, "before", pixels).read_bytes() == mended

    def test_expert_that_saw_every_image_is_not_rare(self, fp32: Path) -> None:
        one = make_dataset().train.pixels.numpy()[:1]
        (visited,) = choose_experts(fp32, one)
        assert q.rare_experts(fp32, one) == {number: 0 for number in range(6) if number not in visited}

    def test_proof_says_it(self, toy_dataset: Dataset, tmp_path: Path) -> None:
        routing = RoutingConfig(num_experts=16, top_k=1)
        said = write_static(routing, toy_dataset, tmp_path / "a.onnx", Calibration(200))
        rows = read_onnx_metadata(tmp_path / "a.onnx")["calibration"]["rows_of_rare_experts"]
        assert rows
        assert all(f"expert {expert} saw {count}" in said for expert, count in rows.items())
        assert said.endswith(" of 200 calibration images: calibrated on all of them")
        assert "calibration" not in write_static(
            RoutingConfig(2, 2), toy_dataset, tmp_path / "b.onnx", Calibration(200)
        )


@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_constant_is_used(fp32: Path, toy_dataset: Dataset, mode: Mode) -> None:
    graph = onnx.load(convert(fp32, toy_dataset, mode)).graph
    assert {constant.name for constant in graph.initializer} <= {name for node in graph.node for name in node.input}


@pytest.mark.parametrize("method", METHODS)
def test_every_session_is_told_its_threads(
    toy_dataset: Dataset, tmp_path: Path, method: CalibrationMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int | None] = []
    opened = onnxruntime.InferenceSession

    def open_session(model: Any, sess_options: Any = None, **others: Any) -> Any:
        threads.append(sess_options and sess_options.intra_op_num_threads)
        return opened(model, sess_options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    write_static(MODELS["sparse"], toy_dataset, tmp_path / "x.onnx", Calibration(60, method))
    assert threads == [1] * 4  # rows of each expert, ranges, those of rare experts, the optimized graph


def test_rows_move_as_bytes_of_one_scale(toy_dataset: Dataset, tmp_path: Path) -> None:
    fp32 = tmp_path / "moe.onnx"
    write_onnx(build_model(PRESETS["compact"].moe(spec(0.18, 0.18))), fp32, {})
    static, dynamic = (q.optimized_graph(convert(fp32, toy_dataset, mode)) for mode in ("static", "dynamic"))

    values = {
        constant.name: numpy_helper.to_array(constant).item() for constant in static.initializer if not constant.dims
    }
    (join,) = (node for node in static.node if node.name == "sorted_outputs")
    assert join.op_type == "QLinearConcat"  # which copies where all scales and zero points are equal
    assert len({values[name] for name in (join.input[0], *join.input[3::3])}) == 1
    assert len({values[name] for name in (join.input[1], *join.input[4::3])}) == 1

    made_by = {name: node for node in dynamic.node for name in node.output}
    (sort,) = (node for node in dynamic.node if node.name == "sorted_rows")
    assert made_by[sort.input[0]].op_type == "DynamicQuantizeLinear"
    (split,) = (node for node in dynamic.node if node.op_type == "Split")
    first = [node.op_type for node in dynamic.node if set(node.input) & set(split.output)]
    assert first == ["MatMulIntegerToFloat"] * 4
    assert [node.op_type for node in dynamic.node].count("DynamicQuantizeMatMul") == 6


def write_all(folder: Path) -> None:
    """Every form of every model."""
    work = make_work(make_dataset())
    for name, routing in MODELS.items():
        preset, data = work.preset, work.dataset.spec
        model = work.build(preset.ffn(data) if routing is None else preset.moe(data, routing)).eval()
        for form_name, form in FORMS.items():
            form.write(model, folder / f"{name}-{form_name}.onnx", work, {"model": name})


def test_same_model_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from test_int8 import write_all; write_all(Path(sys.argv[1]))"
    root = Path(__file__).parents[1]
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        paths = os.pathsep.join([str(root), str(root / "tests")])
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed, "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", code, tmp_path / seed], env=environment, check=True)
    files = sorted((tmp_path / "1").iterdir())
    assert len(files) == len(MODELS) * len(FORMS)
    assert [file.name for file in files if file.read_bytes() != (tmp_path / "2" / file.name).read_bytes()] == []
