"""Where the files of one data set, preset and recipe lie, whose they are, and whether they are up to date."""

import functools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mnist_lab.artifacts import read_onnx_metadata
from mnist_lab.checkpoints import load_checkpoint, read_metadata
from mnist_lab.compress.quantize import needs_reduced_range
from mnist_lab.data import Dataset, Split
from mnist_lab.errors import UserError
from mnist_lab.files import sha256
from mnist_lab.models import PRESETS, ModelConfig, PresetName, dense_rival
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import SparseMoE
from mnist_lab.records import CLAIMS_FOLDER
from mnist_lab.rows import Quantized, Row, Trained
from mnist_lab.runtimes import EXTENSIONS, RuntimeName
from mnist_lab.training import Recipe, RecipeName


@dataclass(frozen=True)
class Lab:
    """One data set, preset and recipe, and the two folders that hold what comes of them."""

    dataset: Dataset
    preset: PresetName
    recipe_name: RecipeName
    recipe: Recipe
    device: str
    threads: int  # of latency measurements
    runtimes: tuple[RuntimeName, ...]  # to measure in, where a row can run there
    checkpoints: Path  # …/<dataset>-<preset>-<recipe>
    results: Path

    @functools.cached_property
    def test(self) -> Split:
        """The test split, read from disk once, when the first finished model is measured."""
        return self.dataset.load_test()

    def with_recipe(self, name: RecipeName, recipe: Recipe) -> "Lab":
        """The same data and preset on another budget, in folders of its own."""
        folder = f"{self.dataset.name}-{self.preset}-{name}"
        return replace(
            self,
            recipe_name=name,
            recipe=recipe,
            checkpoints=self.checkpoints.with_name(folder),
            results=self.results.with_name(folder),
        )

    def for_claims(self) -> "Lab":
        """The same models, with records in a folder below, so that those which only claims compare stay apart."""
        return replace(self, results=self.results / CLAIMS_FOLDER)

    def checkpoint(self, model: str, seed: int, extension: str = "safetensors") -> Path:
        return self.checkpoints / f"{model}-seed{seed}.{extension}"

    def artifact(self, model: str, seed: int) -> Path:
        return self.checkpoint(model, seed, "onnx")

    def file(self, model: str, seed: int, runtime: RuntimeName) -> Path:
        """What a runtime loads."""
        return self.checkpoint(model, seed, EXTENSIONS[runtime])

    def runtimes_of(self, row: Row) -> list[RuntimeName]:
        """Where a row is measured: where it was asked for, or if it runs in none of those, in its own first runtime."""
        return [runtime for runtime in row.runtimes if runtime in self.runtimes] or [row.runtimes[0]]

    def record(self, model: str, seed: int) -> Path:
        return self.results / "runs" / f"{model}-seed{seed}.json"

    def output(self, row: Row, seed: int) -> Path:
        """The file that this row makes first, and that others derive from."""
        return self.checkpoint(row.model, seed, row.extension)


def find_reason_to_make(lab: Lab, row: Row, seed: int) -> str | None:
    """Why a row's file must be made anew: "missing", or "stale: …"; None where it is up to date.

    Raises:
        UserError: the file is broken, or belongs to another preset, recipe or data set: it is not overwritten.
    """
    artifact = lab.artifact(row.model, seed)
    if artifact.exists():
        check_owner(lab, artifact, row.model, read_onnx_metadata(artifact))
    path = lab.output(row, seed)
    if not path.exists():
        return "missing"
    metadata = read_onnx_metadata(path) if isinstance(row, Quantized) else read_metadata(path)
    check_owner(lab, path, row.model, metadata)
    if row.parent is not None:
        parent = lab.checkpoint(row.parent, seed)
        if not parent.exists() or metadata["parent_sha256"] != sha256(parent):
            return f"stale: {row.parent} has changed since"
    if metadata["config"] != config_of(lab, row, seed):
        return "stale: made with other settings"
    return None


def identity(lab: Lab, row: Row, seed: int) -> dict[str, Any]:
    """What a file says of where it belongs and how it was made."""
    return {
        "model": row.model,
        "dataset": lab.dataset.name,
        "preset": lab.preset,
        "recipe": lab.recipe_name,
        "seed": seed,
        "config": config_of(lab, row, seed),
    }


def config_of(lab: Lab, row: Row, seed: int) -> dict[str, Any]:
    """Every setting that the row's file depends on, as JSON gives it back."""
    settings: dict[str, Any]
    if isinstance(row, Trained):
        settings = {
            "architecture": asdict(model_config(lab, row)),
            "recipe": asdict(lab.recipe),
            "distillation": asdict(row.distillation) if row.distillation else None,
        }
    elif isinstance(row, Quantized):
        settings = {
            "mode": row.mode,
            "calibration": asdict(row.calibration) if row.mode == "static" else None,
            "reduce_range": needs_reduced_range(),
        }
    else:
        settings = {"rounding": "bfloat16"}
    decoded: dict[str, Any] = json.loads(json.dumps(settings | {"seed": seed}))
    return decoded


def model_config(lab: Lab, row: Trained) -> ModelConfig:
    preset, mean, std = PRESETS[lab.preset], lab.dataset.mean, lab.dataset.std
    if row.architecture == "moe":
        return preset.moe(mean, std, row.routing)
    if row.architecture in {"ffn", "student"}:
        return preset.ffn(mean, std) if row.architecture == "ffn" else preset.student(mean, std)
    routing = row.routing
    num_experts = routing.top_k if row.architecture == "ffn-active" else routing.num_experts
    return dense_rival(preset.moe(mean, std, routing), num_experts)


def load_parent(lab: Lab, model: str, seed: int) -> FFN | SparseMoE:
    path = lab.checkpoint(model, seed)
    if not path.exists():
        script = {"FFN_baseline": "baseline_mnist.py", "Sparse_MoE": "moe_mnist.py"}.get(
            model.partition("-")[0], "kd_mnist.py"
        )
        raise UserError(
            f"{model} is needed first, and {path} does not exist. Train it with: python {script}, and the same "
            "options --preset, --recipe, --dataset, --seed, --epochs, --batch-size and --checkpoints."
        )
    checkpoint = load_checkpoint(path)
    check_owner(lab, path, model, checkpoint.metadata)
    return checkpoint.model


def check_owner(lab: Lab, path: Path, model: str, metadata: dict[str, Any]) -> None:
    """Raise UserError where a file lies in the place of another model, preset, recipe or data set."""
    expected_owner = {
        "model": model,
        "preset": lab.preset,
        "recipe": lab.recipe_name,
        "dataset": lab.dataset.name,
    }
    for key, expected in expected_owner.items():
        if metadata.get(key) != expected:
            raise UserError(
                f"{path} belongs to {key} {metadata.get(key)}, not {expected}. "
                "Move it away, or name another folder with --checkpoints."
            )
