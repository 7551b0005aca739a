"""Checkpoints: one sealed safetensors file per model, written atomically, read without pickle."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from mnist_lab.files import BLANK, check_seal, read_bytes, reading, seal, write_atomically
from mnist_lab.models import Model, build_skeleton, config_from_dict

FORMAT = "mnist-lab-2"
ADVICE = "Move it away and train again."
WEIGHTS = {torch.float32, torch.bfloat16}


class Stored(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


class Checkpoint(NamedTuple):
    model: Model
    metadata: dict[str, Any]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and `metadata` (anything JSON can hold) to `path`, whole or not at all, sealed with their digest.

    Raises:
        RunFailed: the folder cannot be written.
    """
    fields = {"format": FORMAT, "digest": BLANK, **metadata}
    strings = {key: json.dumps(value, sort_keys=True, allow_nan=False) for key, value in sorted(fields.items())}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = seal(_sort_header(safetensors.torch.save(contiguous, metadata=strings)))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _sort_header(content: bytes) -> bytes:
    """The same safetensors file with its header in sorted order: the library's own order is random.

    The file is the header's length (8 bytes), the header (JSON, padded to 8 bytes), and the data.
    """
    end = _header_end(content)
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def read_tensors(path: Path, *, advice: str = ADVICE) -> Stored:
    """What `save_tensors` wrote.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    content, metadata = _read(path, advice)
    with reading(path, advice):
        return Stored(safetensors.torch.load(content), metadata)


def read_metadata(path: Path) -> dict[str, Any]:
    """What such a file says of itself.

    Raises:
        UserError: as `read_tensors`.
    """
    return _read(path, ADVICE)[1]


def _read(path: Path, advice: str) -> tuple[bytes, dict[str, Any]]:
    content = read_bytes(path, "no checkpoint at {}")
    with reading(path, advice):
        strings = msgspec.json.decode(content[8 : _header_end(content)])["__metadata__"]
        metadata = {key: msgspec.json.decode(value) for key, value in strings.items()}
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']}, this version reads {FORMAT}")
        check_seal(content)
        del metadata["digest"]
    return content, metadata


def save_checkpoint(path: Path, model: Model, metadata: Mapping[str, Any]) -> None:
    """Write weights, architecture and `metadata` (anything JSON can hold) to `path`, whole or not at all.

    Raises:
        RunFailed: the folder cannot be written.
    """
    save_tensors(path, model.state_dict(), {"architecture": asdict(model.config), **metadata})


def load_checkpoint(path: Path) -> Checkpoint:
    """Rebuild the model from its file, in evaluation mode, each tensor in its own precision.

    Raises:
        UserError: as `read_tensors`, or the weights are not those of the architecture in the file, or not finite.
    """
    tensors, metadata = read_tensors(path)
    with reading(path, ADVICE):
        model = build_skeleton(config_from_dict(metadata["architecture"]))
        check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
        # Cloned, since the file's own alignment may be too fine for fast products.
        model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return Checkpoint(model.eval(), metadata)


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where floating-point tensors are not those of these names and shapes, or not finite."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(shapes):
        different = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        raise ValueError(f"it does not hold the model that it describes, but other {', '.join(different[:8])}")
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHTS:
            raise ValueError(f"{name} is of type {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds what is no finite number")
