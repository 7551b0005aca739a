import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import spec

from mnist_lab.errors import UserError
from mnist_lab.files import ensure_writable, write_atomically
from mnist_lab.models import PRESETS, ModelConfig, build_model
from mnist_lab.models.checkpoints import load_checkpoint, read_metadata, save_checkpoint
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


def test_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_may_not_be_looked_into_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        ensure_writable(tmp_path / "folder")


def test_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        ensure_writable(tmp_path / "file" / "folder")
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path / "file" / "folder" / "x.txt", lambda path: path.write_text(""))
