"""ONNX artifacts as files: sealed, checked before anything runs them, and what they say of themselves."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mnist_lab.files import BLANK, check_seal, read_bytes, reading, seal, write_atomically

ADVICE = "Move it away and make it again."
# What the suite's graphs are made of, as `deploy/onnx.py` writes them and ONNX Runtime's converter changes them.
OPERATORS = {
    "Add", "Cast", "Concat", "DequantizeLinear", "Div", "DynamicQuantizeLinear", "Expand", "Flatten", "Gather",
    "GatherElements", "Gemm", "MatMul", "MatMulInteger", "Mul", "QuantizeLinear", "Range", "Relu", "Reshape",
    "ScatterElements", "Shape", "Softmax", "Split", "Squeeze", "Sub", "TopK", "Unsqueeze",
}  # fmt: skip
OF_CONSTANTS = {"Cast", "DequantizeLinear"}  # that may compute from constants alone: the result is no larger by much
SIZED_BY = {"Expand": (1, "Shape"), "Range": (1, "Squeeze")}  # which input says how large the result is, and its source
ITEM_BYTES: dict[int, int] = {
    TensorProto.FLOAT: 4, TensorProto.BFLOAT16: 2, TensorProto.INT64: 8, TensorProto.INT32: 4,
    TensorProto.INT8: 1, TensorProto.UINT8: 1,
}  # fmt: skip


def save_onnx(model: onnx.ModelProto, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a model with `metadata` (anything JSON can hold), a string per key and nothing else; sealed.

    Raises:
        RunFailed: the folder cannot be written.
    """
    for constant in model.graph.initializer:
        if not constant.HasField("raw_data"):  # as the converter leaves its scales
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant), constant.name))
    model.ClearField("metadata_props")
    for key, value in sorted({"digest": BLANK, **metadata}.items()):
        model.metadata_props.add(key=key, value=json.dumps(value, sort_keys=True, allow_nan=False))
    content = seal(model.SerializeToString(deterministic=True))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_artifact(path: Path) -> bytes:
    """The content of an artifact that is safe to run: undamaged, and of nothing but what the suite writes.

    Raises:
        UserError: it is missing, damaged, or not one of this suite's.
    """
    return _read(path)[0]


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model in an artifact.

    Raises:
        UserError: as `read_artifact`.
    """
    return _read(path)[1]


def read_onnx_metadata(path: Path) -> dict[str, Any]:
    """What an artifact says of itself.

    Raises:
        UserError: as `read_artifact`.
    """
    model = read_onnx(path)
    with reading(path, ADVICE):
        return {entry.key: msgspec.json.decode(entry.value) for entry in model.metadata_props if entry.key != "digest"}


def artifact_bytes(path: Path) -> int:
    """Bytes of all constants that an artifact stores."""
    return sum(_constant_bytes(constant) for constant in read_onnx(path).graph.initializer)


def _read(path: Path) -> tuple[bytes, onnx.ModelProto]:
    content = read_bytes(path, "no artifact at {}")
    with reading(path, ADVICE):
        check_seal(content)
        model = onnx.load_from_string(content)
        _check_graph(model)
    return content, model


def _check_graph(model: onnx.ModelProto) -> None:
    """Raise ValueError where running a model could read other files, run other code, or take memory without measure."""
    graph = model.graph
    if model.functions or graph.sparse_initializer or any(opset.domain for opset in model.opset_import):
        raise ValueError("it has functions or operators of its own")
    if [value.name for value in graph.input] != ["pixels"] or [value.name for value in graph.output] != ["logits"]:
        raise ValueError("it does not take pixels and give logits")
    for constant in graph.initializer:
        if constant.external_data or len(constant.raw_data) != _constant_bytes(constant):
            raise ValueError(f"{constant.name} is not stored as its shape says")
        if not _is_finite(constant):
            raise ValueError(f"{constant.name} holds what is no finite number")
    constants = {constant.name for constant in graph.initializer}
    made_by: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in OPERATORS or node.domain:
            raise ValueError(f"it has the operator {node.op_type}, which the suite does not write")
        if constants.issuperset(name for name in node.input if name):  # an optional input may be left out
            if node.op_type not in OF_CONSTANTS:
                raise ValueError(f"{node.name} computes from constants alone")
            constants.update(node.output)
        place, source = SIZED_BY.get(node.op_type, (0, ""))
        if source and made_by.get(node.input[place]) != source:
            raise ValueError(f"{node.name} may be of any size")
        made_by |= dict.fromkeys(node.output, node.op_type)


def _is_finite(constant: onnx.TensorProto) -> bool:
    """Whether all exponents of floating-point values are below the largest, which infinity and NaN have."""
    if constant.data_type == TensorProto.FLOAT:
        return bool(np.isfinite(np.frombuffer(constant.raw_data, np.float32)).all())
    if constant.data_type == TensorProto.BFLOAT16:
        return bool((np.frombuffer(constant.raw_data, np.uint16) & 0x7F80 != 0x7F80).all())
    return True


def _constant_bytes(constant: onnx.TensorProto) -> int:
    """Of a constant's values, by its shape and type; a type that the suite does not write counts as none."""
    return math.prod(constant.dims) * ITEM_BYTES.get(constant.data_type, 0)
