import os
import pickle
import resource
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import spec

from mnist_lab.errors import UserError
from mnist_lab.models import PRESETS, ModelConfig, build_model
from mnist_lab.models.checkpoints import load_checkpoint, read_metadata, save_checkpoint, save_tensors
from mnist_lab.models.moe import RoutingConfig

CONFIGS: list[ModelConfig] = [
    PRESETS["compact"].student(spec(0.1, 0.2)),
    PRESETS["wide"].moe(spec(0.1, 0.2), RoutingConfig(num_experts=3)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["ffn", "moe"])
def test_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    model = build_model(config).eval()
    path = tmp_path / "folder" / "model.safetensors"
    save_checkpoint(path, model, {"seed": 7, "curves": [{"epoch": 1}]})
    loaded, metadata = load_checkpoint(path)
    assert loaded.config == config
    assert not loaded.training
    assert metadata["curves"] == [{"epoch": 1}]
    pixels = torch.rand(3, 1, 28, 28)
    assert torch.equal(loaded(pixels), model(pixels))


def test_loading_leaves_the_default_generator_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_model(CONFIGS[0]), {})
    before = torch.get_rng_state()
    load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a checkpoint was unpickled",))


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "pickle", "foreign", "other weights"])
def test_broken_checkpoint_is_the_users_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_model(CONFIGS[0]), {})
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif damage == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        save_file({"weight": torch.zeros(3)}, path, metadata=_strings(path))
    with pytest.raises(UserError, match="model.safetensors"):
        load_checkpoint(path)


def _strings(path: Path) -> dict[str, str]:
    import json

    return {key: json.dumps(value) for key, value in read_metadata(path).items()}


def test_every_bit_counts(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_model(CONFIGS[0]), {"seed": 0})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in (0, 7, 8, header // 2, header - 1, header, len(whole) // 2, len(whole) - 1):
        for bit in (1, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with pytest.raises(UserError, match="is broken"):
                load_checkpoint(path)
            with pytest.raises(UserError, match="is broken"):
                read_metadata(path)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), torch.complex64, torch.float8_e4m3fn, torch.float16, torch.float64], ids=str
)
def test_weights_that_are_no_weights_are_refused(tmp_path: Path, value: float | torch.dtype) -> None:
    model = build_model(CONFIGS[0])
    tensors = model.state_dict()
    weight = tensors["layers.0.weight"]
    if isinstance(value, torch.dtype):
        tensors["layers.0.weight"] = weight.to(value)
    else:
        weight[0, 0] = value
    path = tmp_path / "model.safetensors"
    save_tensors(path, tensors, {"architecture": asdict(model.config)})
    with pytest.raises(UserError, match=r"model.safetensors is broken: layers.0.weight"):
        load_checkpoint(path)


@pytest.mark.parametrize("width", [1_500_000, 10**12, 0, -1, 1.5, None])
def test_widths_are_compared_before_memory_is_taken(tmp_path: Path, width: float) -> None:
    model = build_model(CONFIGS[0])
    path = tmp_path / "model.safetensors"
    architecture = asdict(model.config) | {"widths": (width, width)}
    save_tensors(path, model.state_dict(), {"architecture": architecture})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="is broken"):
        load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(UserError, match="is not a file"):
        read_metadata(path)
