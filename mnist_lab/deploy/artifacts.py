"""ONNX artifacts as files: sealed, checked before anything runs them, and what they say of themselves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import onnx
from onnx import numpy_helper

from mnist_lab.deploy.safety import check_graph
from mnist_lab.deploy.sparse import graph_bytes, make_dense, store_sparsely
from mnist_lab.files import BLANK, check_seal, read_bytes, reading, seal, write_atomically

ADVICE = "Move it away and make it again."


def save_onnx(model: onnx.ModelProto, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the `content_of` a model.

    Raises:
        RunFailed: the folder cannot be written.
    """
    content = content_of(model, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def content_of(model: onnx.ModelProto, metadata: Mapping[str, Any]) -> bytes:
    """A model as a file, with `metadata` (anything JSON can hold), a string per key and nothing else; sealed.

    Matrices that are smaller so are stored sparsely, in `model` too.
    """
    for constant in model.graph.initializer:
        if not constant.HasField("raw_data"):  # as the converter leaves its scales
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant), constant.name))
    store_sparsely(model.graph)
    model.ClearField("metadata_props")
    for key, value in sorted({"digest": BLANK, **metadata}.items()):
        model.metadata_props.add(key=key, value=json.dumps(value, sort_keys=True, allow_nan=False))
    return seal(model.SerializeToString(deterministic=True))


def read_artifact(path: Path) -> bytes:
    """The content of an artifact that is safe to run: undamaged, and of nothing but what the suite writes.

    Raises:
        UserError: it is missing, damaged, or not one of this suite's.
    """
    return _read(path)[0]


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model in an artifact, all its constants dense, all its nodes named.

    Raises:
        UserError: as `read_artifact`.
    """
    model = _read(path)[1]
    make_dense(model.graph)
    name_nodes(model.graph)
    return model


def name_nodes(graph: onnx.GraphProto) -> None:
    """Name those nodes after their first output, as `deploy/onnx.py` does, whose names a file leaves out."""
    for node in graph.node:
        node.name = node.name or node.output[0]


def read_onnx_metadata(path: Path) -> dict[str, Any]:
    """What an artifact says of itself.

    Raises:
        UserError: as `read_artifact`.
    """
    model = _read(path)[1]
    with reading(path, ADVICE):
        return {entry.key: msgspec.json.decode(entry.value) for entry in model.metadata_props if entry.key != "digest"}


def artifact_bytes(path: Path) -> int:
    """Bytes of all constants that an artifact stores."""
    return graph_bytes(_read(path)[1].graph)


def _read(path: Path) -> tuple[bytes, onnx.ModelProto]:
    content = read_bytes(path, "no artifact at {}")
    with reading(path, ADVICE):
        check_seal(content)
        model = onnx.load_from_string(content)
        check_graph(model)
    return content, model
