"""Classifiers as others export them, made with onnx.helper; they recognise the bars of `tiny.make_dataset`.

A bar of class c lies in row 4 + 2·c, so that each layer but the last can be made by hand: it keeps the rows' means.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE, CLASSES = 28, 10
ROWS = [4 + 2 * label for label in range(CLASSES)]
FloatArray = npt.NDArray[np.float32]


def make_model(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, npt.NDArray[Any]],
    *,
    shape: Sequence[int | str | None] = ("N", 1, SIZE, SIZE),
    classes: int = CLASSES,
    dtype: int = TensorProto.FLOAT,
    opset: int = 17,
    batch: int | str = "N",
) -> onnx.ModelProto:
    """A model from "image" to "scores"."""
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", dtype, list(shape))],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def linear(num_noise: int = 22, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """Weights (784, 10 + noise) of rows' means and of noise, and what reads classes of them (10 + noise, 10)."""
    means = np.zeros((SIZE, SIZE, CLASSES), np.float32)
    for label, row in enumerate(ROWS):
        means[row, :, label] = 1 / SIZE
    random = np.random.default_rng(seed)
    noise = random.normal(scale=0.01, size=(SIZE * SIZE, num_noise))
    first = np.concatenate([means.reshape(-1, CLASSES), noise], axis=1)
    last = np.concatenate([10 * np.eye(CLASSES), random.normal(scale=0.01, size=(num_noise, CLASSES))])
    return first.astype(np.float32), last.astype(np.float32)


def mlp(*, operator: str = "Gemm", scale: float = 1, softmax: bool = False, **how: Any) -> onnx.ModelProto:
    """Flatten, two products, Relu between them; of pixels up to `scale`."""
    first, last = linear()
    constants: dict[str, npt.NDArray[Any]] = {"first": first / np.float32(scale), "last": last}
    nodes = [helper.make_node("Flatten", ["image"], ["flat"])]
    if how.get("dtype") == TensorProto.UINT8:
        nodes.insert(0, helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT))
        nodes[1].input[0] = "float"
    for name, taken, given in (("first", "flat", "hidden"), ("last", "relu", "product")):
        if operator == "Gemm":  # as PyTorch writes it
            constants[name] = np.ascontiguousarray(constants[name].T)
            constants[f"{name}.bias"] = np.full(len(constants[name]), 0.01, np.float32)
            nodes.append(helper.make_node("Gemm", [taken, name, f"{name}.bias"], [given], name=name, transB=1))
        else:
            nodes.append(helper.make_node("MatMul", [taken, name], [given], name=name))
        if given == "hidden":
            nodes.append(helper.make_node("Relu", ["hidden"], ["relu"]))
    nodes.append(helper.make_node("Softmax" if softmax else "Identity", ["product"], ["scores"]))
    return make_model(nodes, constants, **how)


def linear_classifier(*, num_classes: int, height: int, width: int) -> onnx.ModelProto:
    """One product of random weights, for data of another size."""
    weights = np.random.default_rng(0).normal(size=(height * width, num_classes)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
    ]
    return make_model(nodes, {"weights": weights}, shape=("N", 1, height, width), classes=num_classes)


def cnn(*, head: bool = True, **how: Any) -> onnx.ModelProto:
    """A convolution, batch normalisation, pooling along rows, and a product, or another convolution as the head."""
    random = np.random.default_rng(0)
    kernel = random.normal(scale=0.02, size=(4, 1, 3, 3)).astype(np.float32)
    kernel[0, 0, 1, 1] += 1
    first = np.zeros((CLASSES, 4, SIZE, 1), np.float32)
    for label, row in enumerate(ROWS):
        first[label, 0, row] = 10
    constants: dict[str, npt.NDArray[Any]] = {
        "kernel": kernel,
        "gain": np.full(4, 1.1, np.float32),
        "shift": np.full(4, 0.01, np.float32),
        "mean": np.full(4, 0.1, np.float32),
        "variance": np.full(4, 0.9, np.float32),
        "head.bias": np.zeros(CLASSES, np.float32),
        "head": first.reshape(CLASSES, -1) if head else first,
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["windows"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["windows", "gain", "shift", "mean", "variance"], ["normal"]),
        helper.make_node("Relu", ["normal"], ["relu"]),
        helper.make_node("AveragePool", ["relu"], ["rows"], kernel_shape=[1, SIZE]),
    ]
    if head:
        nodes.append(helper.make_node("Flatten", ["rows"], ["flat"]))
        nodes.append(helper.make_node("Gemm", ["flat", "head", "head.bias"], ["scores"], name="head", transB=1))
    else:
        nodes.append(helper.make_node("Conv", ["rows", "head"], ["map"], name="head"))
        nodes.append(helper.make_node("Flatten", ["map"], ["scores"]))
    return make_model(nodes, constants, **how)


def fixed_cnn(batch: int = 1) -> onnx.ModelProto:
    """The same for so many images and no others: the batch stands in a Reshape, as exports have it."""
    model = cnn(shape=(batch, 1, SIZE, SIZE), batch=batch)
    for node in model.graph.node:
        if node.op_type == "Flatten":
            node.op_type = "Reshape"
            node.input.append("sizes")
    model.graph.initializer.append(numpy_helper.from_array(np.array([batch, -1]), "sizes"))
    return model


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
