"""ONNX artifacts as files: sealed, checked before anything runs them, and what they say of themselves.

That is text, a string per key; in files of so few weights that it would take a fifth of their bytes, the same packed.
"""

import base64
import json
import zlib
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
INTERFACE = "interface"  # the key of what goes in and comes out, which packed metadata leaves to the file beside
PACKED = "packed"  # the key of metadata as deflated JSON (RFC 1951) in base 85 (RFC 1924)
MAX_PACKED = 2**20  # bytes of the JSON
# What such JSON usually says, most of it last: what stands here takes next to no bytes. Files depend on each letter.
WORDS = (
    b'"fashion","digits""best""quick""wide""INT8""scheme":"affine","symmetric""method":{"activation_bits":null,"method"'
    b':"gptq","nearest""router_bits":null,"scheme":"symmetric"}"WeightOnly""ternary"teacher"-ternary-h32-b2-b3-b1-w16x5s2'
    b'"mnist","preset":"compact","recipe":"standard","seed":0}"sha256":"-seed0.safetensors","model":"{"config":{"form":'
    b'{"activation_bits":null,"kind":"AsTrained","rounding":{"bits":4,"first_layer_bits":null,"group_size":"channel"},'
    b'"router_bits":null},"step":null},"dataset":"mnist","model":"KD_small_QAT-self-pool2-w8x3s1-w16x3s2","parents":'
    b'{"source":{"file":"KD_small_QAT_FP32-'
)


def save_onnx(model: onnx.ModelProto, path: Path, metadata: Mapping[str, Any], *, packed: bool = False) -> None:
    """Write the `content_of` a model.

    Raises:
        RunFailed: the folder cannot be written.
    """
    content = content_of(model, metadata, packed=packed)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def content_of(model: onnx.ModelProto, metadata: Mapping[str, Any], *, packed: bool = False) -> bytes:
    """A model as a file, with `metadata` (anything JSON can hold) and no other; sealed.

    Matrices that are smaller so are stored sparsely, in `model` too.

    Args:
        packed: not a string per key, but one of fewer bytes, and nothing of the interface.
    """
    for constant in model.graph.initializer:
        if not constant.HasField("raw_data"):  # as the converter leaves its scales
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant), constant.name))
    store_sparsely(model.graph)
    model.ClearField("metadata_props")
    if packed:
        texts = {PACKED: _pack({key: value for key, value in metadata.items() if key != INTERFACE})}
    else:
        texts = {key: _to_json(value) for key, value in metadata.items()}
    for key, text in sorted({"digest": _to_json(BLANK), **texts}.items()):
        model.metadata_props.add(key=key, value=text)
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
        texts = {entry.key: entry.value for entry in model.metadata_props if entry.key != "digest"}
        packed: dict[str, Any] = _unpack(texts.pop(PACKED)) if PACKED in texts else {}
        return packed | {key: msgspec.json.decode(text) for key, text in texts.items()}


def is_packed(path: Path) -> bool:
    """Whether what an artifact says of itself is packed.

    Raises:
        UserError: as `read_artifact`.
    """
    return any(entry.key == PACKED for entry in _read(path)[1].metadata_props)


def _to_json(value: Any, **how: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, **how)


def _pack(metadata: Mapping[str, Any]) -> str:
    packer = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS, zdict=WORDS)
    text = _to_json(metadata, separators=(",", ":")).encode()
    return base64.b85encode(packer.compress(text) + packer.flush()).decode()


def _unpack(text: str) -> dict[str, Any]:
    unpacker = zlib.decompressobj(wbits=-zlib.MAX_WBITS, zdict=WORDS)
    found = unpacker.decompress(base64.b85decode(text), MAX_PACKED)
    if not unpacker.eof:
        raise ValueError("what it says of itself is cut short, or of any size")
    return msgspec.json.decode(found, type=dict[str, Any])


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
