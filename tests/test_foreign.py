"""Classifiers that were made elsewhere: what is read, how images become their input, and what is refused in a line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_models as made
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny import make_dataset

from mnist_lab import measure
from mnist_lab.deploy.foreign import ForeignModel, read_foreign
from mnist_lab.deploy.foreign_session import ForeignSession, are_probabilities
from mnist_lab.deploy.image_input import Preparation
from mnist_lab.errors import UserError

PIXELS, LABELS = make_dataset().train.numpy()
Make = Callable[[], onnx.ModelProto]


def read(model: onnx.ModelProto | bytes, folder: Path, *, output: str | None = None, **how: Any) -> ForeignModel:
    file = folder / "net.onnx"
    file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return read_foreign(file, Preparation(**how), image_size=(28, 28), num_classes=10, output=output)


def predict(foreign: ForeignModel, pixels: measure.Array = PIXELS) -> measure.Array:
    return measure.predict(ForeignSession(foreign, foreign.content, threads=1).predict, pixels)


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (made.mlp, {}),
        (lambda: made.mlp(shape=("N", 784)), {}),
        (lambda: made.mlp(shape=("N", 28, 28)), {}),
        (lambda: made.mlp(shape=("N", 28, 28, 1)), {}),
        (lambda: made.mlp(shape=(None, None, None, None)), {"layout": "nhwc"}),
        (lambda: made.mlp(shape=(None, None)), {}),
        (lambda: made.mlp(scale=255), {"scale": 255}),
        (lambda: made.mlp(scale=255, dtype=TensorProto.UINT8), {}),
        (made.cnn, {}),
        (lambda: made.cnn(opset=9), {}),
    ],
    ids=["nchw", "flat", "nhw", "nhwc", "nhwc by option", "flat of any size", "255", "bytes", "cnn", "old"],
)
def test_bars_are_recognised_however_a_model_takes_them(make: Make, how: dict[str, Any], tmp_path: Path) -> None:
    foreign = read(make(), tmp_path, **how)
    assert measure.accuracy(predict(foreign), LABELS) == 1
    assert foreign.fixed_batch is None


def weigh_channels(*shape: int | str) -> onnx.ModelProto:
    """Scores that are the sum of each channel, of all pixels."""
    axes = [2, 3] if shape[1] == 3 else [1, 2]
    nodes = [
        helper.make_node("ReduceSum", ["image", "axes"], ["sums"], keepdims=0),
        helper.make_node("MatMul", ["sums", "spread"], ["scores"]),
    ]
    return made.make_model(nodes, {"axes": np.array(axes), "spread": np.eye(3, 10, dtype=np.float32)}, shape=shape)


@pytest.mark.parametrize("shape", [("N", 3, 28, 28), ("N", 28, 28, 3)])
def test_grey_goes_into_three_channels_each_with_its_own_mean_and_deviation(
    shape: tuple[int | str, ...], tmp_path: Path
) -> None:
    foreign = read(weigh_channels(*shape), tmp_path, scale=255, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0))
    expected = [(255 * PIXELS - mean).sum(axis=(1, 2, 3)) / std for mean, std in ((1, 1), (2, 2), (3, 4))]
    np.testing.assert_allclose(predict(foreign)[:, :3], np.stack(expected, axis=1), rtol=1e-4)


def test_what_was_assumed_is_said(tmp_path: Path) -> None:
    (line,) = read(made.mlp(), tmp_path).notes
    assert "read as nchw, float32" in line
    assert "--layout, --scale, --mean and --std not given" in line
    (line,) = read(made.mlp(), tmp_path, layout="nchw", scale=1, mean=(0.1,), std=(0.3,)).notes
    assert "(pixel - 0.1) / 0.3" in line
    assert "not given" not in line


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_that_an_export_fixed_is_freed(batch: int, tmp_path: Path) -> None:
    foreign = read(made.fixed_cnn(batch), tmp_path)
    assert foreign.fixed_batch is None
    assert any(f"batch of {batch} is free" in note for note in foreign.notes)
    np.testing.assert_allclose(predict(foreign), predict(read(made.cnn(), tmp_path)), rtol=1e-4)


def test_batch_that_cannot_be_freed_is_taken_as_it_is(tmp_path: Path) -> None:
    """Scores that depend on the whole batch are others in one of another size."""
    model = made.mlp(shape=(4, 1, 28, 28), batch=4)
    model.graph.node[-1].op_type = "Softmax"
    model.graph.node[-1].attribute.append(helper.make_attribute("axis", 0))
    foreign = read(model, tmp_path)
    assert foreign.fixed_batch == 4
    assert any("4 images at a time" in note for note in foreign.notes)
    scores = predict(foreign, PIXELS[:10])  # the last two, and as many again
    assert scores.shape == (10, 10)
    np.testing.assert_allclose(scores[:4].sum(axis=0), 1, rtol=1e-4)


def test_one_image_at_a_time_is_said(tmp_path: Path) -> None:
    model = made.mlp(shape=(1, 1, 28, 28), batch=1)
    nodes = [
        helper.make_node("Expand", ["first_token", "one"], ["token"]),
        helper.make_node("Concat", ["token", "before"], ["both"], axis=1),
        helper.make_node("Slice", ["both", "start", "end", "axis"], ["scores"]),
    ]
    model.graph.node[-1].output[0] = "before"
    model.graph.node.extend(nodes)
    constants = {"first_token": [[9.0]], "one": [1, 1], "start": [1], "end": [11], "axis": [1]}
    for name, value in constants.items():
        kind = np.float32 if name == "first_token" else np.int64
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, kind), name))
    foreign = read(model, tmp_path)
    assert foreign.fixed_batch == 1
    assert any("one image at a time" in note for note in foreign.notes)
    assert measure.accuracy(predict(foreign, PIXELS[:20]), LABELS[:20]) == 1


def test_probabilities_become_logits_of_the_same_classes_and_loss(tmp_path: Path) -> None:
    scores = predict(read(made.mlp(softmax=True), tmp_path))
    logits = predict(read(made.mlp(), tmp_path))
    assert are_probabilities(scores)
    assert not are_probabilities(logits)
    foreign = read(made.mlp(softmax=True), tmp_path)
    session = ForeignSession(foreign, foreign.content, threads=1, of_probabilities=True)
    assert measure.cross_entropy(session.predict(PIXELS), LABELS) == pytest.approx(
        measure.cross_entropy(logits, LABELS), rel=1e-3
    )


def two_outputs() -> onnx.ModelProto:
    model = made.mlp()
    model.graph.node.append(helper.make_node("ArgMax", ["product"], ["label"], axis=1))
    model.graph.output.insert(0, helper.make_tensor_value_info("label", TensorProto.INT64, ["N", 1]))
    return model


def test_one_of_several_outputs_is_chosen(tmp_path: Path) -> None:
    foreign = read(two_outputs(), tmp_path, output="scores")
    assert [value.name for value in foreign.model.graph.output] == ["scores"]
    assert measure.accuracy(predict(foreign), LABELS) == 1


def with_nodes(*nodes: onnx.NodeProto, **constants: npt.NDArray[Any]) -> onnx.ModelProto:
    """The MLP, and something more that is added to its scores."""
    model = made.mlp()
    model.graph.node[-1].output[0] = "before"
    model.graph.node.extend([*nodes, helper.make_node("Add", ["before", "more"], ["scores"])])
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def in_another_file() -> onnx.ModelProto:
    model = made.mlp()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return model


def with_function() -> onnx.ModelProto:
    model = made.mlp()
    opset = [helper.make_opsetid("", 17)]
    model.functions.append(
        helper.make_function("mine", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opset)
    )
    return model


def with_branch() -> onnx.ModelProto:
    graph = helper.make_graph([], "then", [], [helper.make_tensor_value_info("more", TensorProto.FLOAT, None)])
    node = helper.make_node("If", ["yes"], ["more"], then_branch=graph, else_branch=graph)
    return with_nodes(node, yes=np.array(True))


def with_weights(values: npt.NDArray[Any]) -> onnx.ModelProto:
    model = made.mlp()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, model.graph.initializer[0].name))
    return model


def text_model() -> onnx.ModelProto:
    model = made.mlp()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("tokens", TensorProto.INT64, ["N", 128]))
    model.graph.node[0].input[0] = "tokens"
    return model


def two_inputs() -> onnx.ModelProto:
    model = with_nodes()
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["N", 10]))
    return model


BIG = np.array([10**6, 10**6])
BAD: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "text": (lambda: b"not a model at all", "no ONNX file"),
    "empty": (lambda: b"", "no ONNX file"),
    "truncated": (lambda: made.mlp().SerializeToString()[:-50_000], "no ONNX file, or only part of one"),
    "weights elsewhere": (in_another_file, "its weights lie in another file"),
    "own operator": (
        lambda: with_nodes(helper.make_node("Mine", ["before"], ["more"], domain="my.domain")),
        "no standard ONNX: my.domain.Mine",
    ),
    "unknown operator": (lambda: with_nodes(helper.make_node("Mine", ["before"], ["more"])), "no standard ONNX: Mine"),
    "functions": (with_function, "functions of its own"),
    "branch": (with_branch, "runs a graph within"),
    "two inputs": (two_inputs, "its inputs are image (N, 1, 28, 28), more (N, 10)"),
    "text model": (text_model, "its input tokens is int64 (N, 128)"),
    "four channels": (lambda: made.mlp(shape=("N", 4, 28, 28)), "has 4 channels"),
    "another size": (lambda: made.mlp(shape=("N", 1, 32, 32)), "the sizes differ"),
    "of volumes": (lambda: made.mlp(shape=("N", 1, 8, 28, 28)), "(N, 1, 8, 28, 28) holds no images"),
    "other classes": (lambda: with_weights_of_seven(), "not (N, 10)"),
    "half precision": (lambda: with_weights(np.zeros((32, 784), np.float16)), "its weights are float16"),
    "no numbers": (lambda: with_weights(np.full((32, 784), np.nan, np.float32)), "no finite numbers"),
    "memory for constants": (
        lambda: with_nodes(
            helper.make_node("ConstantOfShape", ["big"], ["huge"]),
            helper.make_node("ReduceSum", ["huge"], ["more"], keepdims=0),
            big=BIG,
        ),
        "values for an image and 1,000,000,000,001 besides",
    ),
    "memory for images": (
        lambda: with_nodes(
            helper.make_node("Tile", ["before", "big"], ["huge"]),
            helper.make_node("ReduceSum", ["huge"], ["more"], keepdims=0),
            big=np.array([1, 10**6]),
        ),
        "values for an image",
    ),
    "memory that images say": (
        lambda: with_nodes(
            helper.make_node("Cast", ["image"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Reshape", ["whole", "all"], ["sizes"]),
            helper.make_node("ConstantOfShape", ["sizes"], ["huge"]),
            helper.make_node("ReduceSum", ["huge"], ["more"], keepdims=0),
            all=np.array([-1]),
        ),
        "cannot be told",
    ),
}


def with_weights_of_seven() -> onnx.ModelProto:
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["scores"])]
    return made.make_model(nodes, {"w": np.zeros((784, 7), np.float32)}, classes=7)


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_such_classifier_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    make, says = BAD[kind]
    with pytest.raises(UserError, match="net.onnx cannot be (compared|run): ") as error:
        predict(read(make(), tmp_path))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "how", "says"),
    [
        (made.mlp, {"layout": "flat"}, "holds no images in --layout flat"),
        (made.mlp, {"layout": "nhwc"}, "has 28 channels"),
        (made.mlp, {"output": "nothing"}, "no --output nothing; its outputs are scores"),
        (two_outputs, {}, "its output label is int64"),
        (made.mlp, {"mean": (0.1, 0.2, 0.3)}, "one channel"),
        (lambda: made.mlp(dtype=TensorProto.UINT8), {"mean": (0.1,)}, "uint8"),
        (lambda: made.mlp(dtype=TensorProto.UINT8), {"scale": 1}, "uint8"),
    ],
)
def test_options_that_do_not_fit_the_file_are_named(make: Make, how: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(make(), tmp_path, **how)
    assert says in str(error.value)


@pytest.mark.parametrize("how", [{"std": (0.0,)}, {"std": (-1.0,)}, {"mean": (1.0, 2.0)}, {"mean": (float("nan"),)}])
def test_bad_statistics_are_named(how: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--mean|--std"):
        Preparation(**how)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(UserError):
            read_foreign(path, Preparation(), image_size=(28, 28), num_classes=10)
