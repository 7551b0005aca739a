"""Matrices stored sparsely: the same model in fewer bytes, in every form and engine."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny import make_dataset, spec

from mnist_lab.compress.bfloat16 import has_bfloat16, round_weights
from mnist_lab.compress.int8 import Calibration, DynamicInt8, StaticInt8
from mnist_lab.compress.prune_weights import Pruner, weight_matrices
from mnist_lab.deploy.artifacts import artifact_bytes, read_artifact, read_onnx, read_onnx_metadata, save_onnx
from mnist_lab.deploy.onnx import build_onnx, write_onnx
from mnist_lab.deploy.sparse import bytes_by_form, describe_storage, make_dense, store_sparsely
from mnist_lab.experiments.technique import Form, Work
from mnist_lab.models import PRESETS, Model, ModelConfig, build_model
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.runtimes import Precision, RuntimeName, open_session
from mnist_lab.runtimes.onnxruntime import PROVIDERS
from mnist_lab.training import find_recipe, torch_predictor

PRESET = PRESETS["compact"]
CONFIGS: dict[str, ModelConfig] = {
    "ffn": PRESET.ffn(spec(0.18, 0.18)),
    "moe": PRESET.moe(spec(0.18, 0.18), RoutingConfig()),
    "every expert": PRESET.moe(spec(0.18, 0.18), RoutingConfig(2, 2)),
}
PIXELS = make_dataset().validation.pixels.numpy()


def make_model(name: str, share_of_zeros: float) -> Model:
    """With so many zeros in each matrix but the router's."""
    torch.manual_seed(0)
    model = build_model(CONFIGS[name]).eval()
    matrices = weight_matrices(model)
    pruner = Pruner(model, dict.fromkeys(matrices, torch.ones(1, 1)), dict.fromkeys(matrices, 1 - share_of_zeros))
    pruner.cut()
    pruner.fold()
    return model


def constants(graph: onnx.GraphProto) -> dict[str, npt.NDArray[Any]]:
    return {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}


def sparse_names(file: Path) -> set[str]:
    return {constant.values.name for constant in onnx.load(file).graph.sparse_initializer}


@pytest.mark.parametrize("precision", ["FP32", "BF16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_is_what_was_written(name: str, precision: Precision, tmp_path: Path) -> None:
    model = make_model(name, 0.9)
    model = round_weights(model) if precision == "BF16" else model
    file = tmp_path / "model.onnx"
    write_onnx(model, file, {"model": "x"})
    onnx.checker.check_model(onnx.load(file))
    weights = {name for name in constants(build_onnx(model).graph) if ".weight" in name}
    assert sparse_names(file) == weights
    expected, found = constants(build_onnx(model).graph), constants(read_onnx(file).graph)
    assert list(found) == list(expected)
    for constant, values in expected.items():
        assert found[constant].dtype == values.dtype
        np.testing.assert_array_equal(found[constant], values)
    assert not read_onnx(file).graph.sparse_initializer
    assert onnx.load_from_string(read_artifact(file)).graph.sparse_initializer
    assert read_onnx_metadata(file)["model"] == "x"


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", CONFIGS)
def test_engines_compute_the_same_logits(name: str, runtime: RuntimeName, tmp_path: Path) -> None:
    model = make_model(name, 0.9)
    write_onnx(model, tmp_path / "model.onnx", {})
    session = open_session(runtime, tmp_path / "model.onnx", precision="FP32", threads=1)
    np.testing.assert_allclose(session.predict(PIXELS), torch_predictor(model)(PIXELS), atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no BF16 products")
def test_bf16_runs(tmp_path: Path) -> None:
    model = make_model("ffn", 0.9)
    write_onnx(round_weights(model), tmp_path / "model.onnx", {})
    logits = open_session("openvino", tmp_path / "model.onnx", precision="BF16", threads=1).predict(PIXELS)
    np.testing.assert_allclose(logits, torch_predictor(model)(PIXELS), atol=0.05)


def test_file_takes_12_bytes_for_each_value_that_is_not_zero(tmp_path: Path) -> None:
    for share in (0.0, 0.9):
        write_onnx(make_model("ffn", share), tmp_path / f"{share}.onnx", {})
    kept = sum(round(0.1 * inputs * outputs) for inputs, outputs in ((784, 256), (256, 128), (128, 10)))
    whole, pruned = tmp_path / "0.0.onnx", tmp_path / "0.9.onnx"
    assert artifact_bytes(pruned) == 12 * kept + 4 * (256 + 128 + 10)
    assert pruned.stat().st_size - artifact_bytes(pruned) < 3000  # all that is no constant
    assert pruned.stat().st_size < 0.31 * whole.stat().st_size


@pytest.mark.parametrize("name", CONFIGS)
def test_below_two_thirds_of_zeros_nothing_is_sparse(name: str, tmp_path: Path) -> None:
    model, file = make_model(name, 0.5), tmp_path / "model.onnx"
    write_onnx(model, file, {})
    assert sparse_names(file) == set()
    assert onnx.load(file).graph == build_onnx(model).graph


def test_same_model_gives_the_same_bytes_also_after_reading(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.onnx" for number in range(3)]
    for file in files[:2]:
        write_onnx(make_model("moe", 0.95), file, {"model": "x"})
    save_onnx(read_onnx(files[0]), files[2], read_onnx_metadata(files[0]))
    assert len({file.read_bytes() for file in files}) == 1


TYPES: dict[int, tuple[type[np.unsignedinteger[Any]], int]] = {
    TensorProto.FLOAT: (np.uint32, 4),
    TensorProto.BFLOAT16: (np.uint16, 2),
}
TYPES |= dict.fromkeys((TensorProto.INT8, TensorProto.UINT8), (np.uint8, 1))


def graph_of(constant: onnx.TensorProto) -> onnx.GraphProto:
    return helper.make_graph([helper.make_node("Relu", [constant.name], ["y"])], "x", [], [], [constant])


@settings(deadline=None, database=None)
@given(
    kind=st.sampled_from(list(TYPES)),
    shape=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    num_nonzero=st.integers(0, 600),
)
def test_stored_is_what_takes_fewer_bytes(kind: int, shape: list[int], num_nonzero: int) -> None:
    bits, value_bytes = TYPES[kind]
    values, generator = np.zeros(np.prod(shape), bits), np.random.default_rng(0)
    num_nonzero = min(num_nonzero, values.size)
    values[generator.permutation(values.size)[:num_nonzero]] = generator.integers(1, 100, num_nonzero)
    graph = graph_of(TensorProto(name="w", data_type=kind, dims=shape, raw_data=values.tobytes()))
    before = graph.SerializeToString()
    store_sparsely(graph)
    is_smaller = num_nonzero * (8 + value_bytes) < values.nbytes and len(shape) > 1
    in_proportion = values.size <= 1024 * num_nonzero and max(shape) <= 16 * num_nonzero
    assert bool(graph.sparse_initializer) == (is_smaller and in_proportion)
    make_dense(graph)
    assert graph.SerializeToString() == before


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.BFLOAT16])
def test_zero_with_a_minus_is_a_zero(kind: int) -> None:
    bits, _ = TYPES[kind]
    values = np.full((20, 20), 1 << (8 * np.dtype(bits).itemsize - 1), bits)
    values[3, :5] = 1
    graph = graph_of(TensorProto(name="w", data_type=kind, dims=values.shape, raw_data=values.tobytes()))
    store_sparsely(graph)
    (stored,) = graph.sparse_initializer
    assert list(stored.values.dims) == [5]


def test_matrix_of_a_thousandth_is_sparse_and_what_is_out_of_proportion_dense() -> None:
    for shape, num_nonzero, is_sparse in (((784, 256), 201, True), ((784, 256), 195, False), ((1000, 5), 5, False)):
        values = np.zeros(shape, np.float32)
        values.ravel()[:num_nonzero] = 1
        graph = graph_of(numpy_helper.from_array(values, "w"))
        store_sparsely(graph)
        assert bool(graph.sparse_initializer) == is_sparse, shape


@pytest.mark.slow
@pytest.mark.parametrize("form", [StaticInt8(Calibration(100)), DynamicInt8()], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CONFIGS)
def test_int8_runs_in_integers_and_keeps_every_zero(name: str, form: Form, tmp_path: Path) -> None:
    dataset, model, file = make_dataset(), make_model(name, 0.95), tmp_path / "int8.onnx"
    work = Work(dataset, PRESET, find_recipe("quick", "compact"), seed=0, device="cpu", name="x")
    form.write(model, file, work, {"model": "x"})
    assert "in float" in form.prove(model, file)["text"]
    fp32, found = constants(build_onnx(model).graph), constants(read_onnx(file).graph)
    weights = [weight for weight in fp32 if weight.endswith(".weight")]
    assert sparse_names(file) == {f"{weight}_quantized" for weight in weights}
    for weight in weights:
        quantized = found[f"{weight}_quantized"]
        assert quantized.dtype == np.int8
        assert not quantized[fp32[weight] == 0].any()
    kept = sum(np.count_nonzero(found[f"{weight}_quantized"]) for weight in weights)
    others = sum(values.nbytes for name, values in found.items() if not name.endswith(".weight_quantized"))
    assert artifact_bytes(file) == 9 * kept + others
    logits = open_session("onnxruntime", file, precision="INT8", threads=1).predict(PIXELS)
    dense = onnxruntime.InferenceSession(read_onnx(file).SerializeToString(), providers=PROVIDERS)
    np.testing.assert_array_equal(logits, dense.run(["logits"], {"pixels": PIXELS})[0])
    expected = torch_predictor(model)(PIXELS)
    # Of an untrained router some images take another route than in float.
    assert np.square(logits - expected).sum() < (0.01 if name == "ffn" else 0.05) * np.square(expected).sum()


def test_storage_is_told_of_the_file(tmp_path: Path) -> None:
    said = {}
    for share in (0.5, 0.9):
        write_onnx(make_model("ffn", share), tmp_path / "model.onnx", {})
        said[share] = describe_storage(onnx.load(tmp_path / "model.onnx").graph)
    assert said == {
        0.5: "dense, 0.939 MB: 50.0% of the values with an index of 8 bytes each would take 1.41 MB",
        0.9: "3 of 3 matrices sparse: 10.0% of their values with an index of 8 bytes each, 0.282 MB in all; "
        "dense 0.939 MB",
    }


@pytest.mark.parametrize(("share", "smallest"), [(0.5, "dense INT8"), (0.8, "dense INT8"), (0.9, "sparse INT8")])
def test_bytes_by_form_follow_from_the_counts(share: float, smallest: str) -> None:
    graph = build_onnx(make_model("ffn", share)).graph
    matrices = [values for values in constants(graph).values() if values.ndim > 1]
    num_values, kept = sum(m.size for m in matrices), sum(np.count_nonzero(m) for m in matrices)
    sizes = bytes_by_form(graph)
    assert sizes == {
        "dense FP32": 4 * num_values,
        "sparse FP32": 12 * kept,
        "dense INT8": num_values,
        "sparse INT8": 9 * kept,
    }
    store_sparsely(graph)
    assert bytes_by_form(graph) == sizes
    assert min(sizes, key=sizes.__getitem__) == smallest
