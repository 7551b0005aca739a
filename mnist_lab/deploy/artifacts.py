"""ONNX artifacts as files: what they say of themselves, and how much they store."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from mnist_lab.errors import UserError


def set_onnx_metadata(model: onnx.ModelProto, metadata: Mapping[str, Any]) -> None:
    """Store `metadata` (anything JSON can hold) in a model, a string per key, and nothing else."""
    model.ClearField("metadata_props")
    add_onnx_metadata(model, metadata)


def add_onnx_metadata(model: onnx.ModelProto, metadata: Mapping[str, Any]) -> None:
    """Store more of it, beside what is there."""
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value, sort_keys=True))


def read_onnx_metadata(path: Path) -> dict[str, Any]:
    """What an artifact of this suite says of itself.

    Raises:
        UserError: the file is truncated, or not one of this suite's.
    """
    try:
        properties = onnx.load(path).metadata_props
        metadata = {entry.key: json.loads(entry.value) for entry in properties}
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        raise UserError(f"{path} is truncated or not an artifact of this suite ({error}). Move it away.") from error
    if "model" not in metadata:
        raise UserError(f"{path} is not an artifact of this suite. Move it away.")
    return metadata


def artifact_bytes(path: Path) -> int:
    """Bytes of all constants that an ONNX file stores."""
    return sum(numpy_helper.to_array(constant).nbytes for constant in onnx.load(path).graph.initializer)
