"""Checkpoints: one safetensors file per model, written atomically, read without pickle."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save

from mnist_lab.errors import UserError
from mnist_lab.files import write_atomically
from mnist_lab.models import Model, build_model, config_from_dict

FORMAT = "mnist-lab-1"


class Checkpoint(NamedTuple):
    model: Model
    metadata: dict[str, Any]


def save_checkpoint(path: Path, model: Model, metadata: Mapping[str, Any]) -> None:
    """Write weights, architecture and `metadata` (anything JSON can hold) to `path`, whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    fields = {"format": FORMAT, "architecture": asdict(model.config), **metadata}
    strings = {key: json.dumps(value, sort_keys=True) for key, value in sorted(fields.items())}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    content = _sort_header(save(tensors, metadata=strings))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _sort_header(content: bytes) -> bytes:
    """The same safetensors file with its header in sorted order: the library's own order is random.

    The file is the header's length (8 bytes), the header (JSON, padded to 8 bytes), and the data.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def read_metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without its weights.

    Raises:
        UserError: the file is missing, truncated, or not one of this suite's checkpoints.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is truncated or not a checkpoint ({error}). Move it away and train again.") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this suite. Move it away and train again.")
    return metadata


def load_checkpoint(path: Path) -> Checkpoint:
    """Rebuild the model from its file, in evaluation mode.

    Raises:
        UserError: as `read_metadata`, or the weights do not fit the architecture in the file.
    """
    metadata = read_metadata(path)
    try:
        # Every tensor comes from the file, in its own precision. (On torch's meta device, which would draw no initial
        # weights, drawing them imports the compiler.)
        with torch.random.fork_rng(devices=[]):
            model = build_model(config_from_dict(metadata["architecture"]))
        with safetensors.safe_open(path, framework="pt") as file:
            # Cloned, since the file's own alignment may be too fine for fast products.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        model.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} does not hold the model that it describes ({error}). Train it again.") from error
    return Checkpoint(model.eval(), metadata)
