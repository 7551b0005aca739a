"""Checkpoint -> the files that are deployed: ONNX in FP32, BF16 and INT8, and the PyTorch program in INT8."""

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from mnist_lab.artifacts import read_onnx_metadata
from mnist_lab.checkpoints import load_checkpoint, save_checkpoint
from mnist_lab.compress.bfloat16 import round_weights
from mnist_lab.compress.quantize import quantize
from mnist_lab.data import calibration_pixels
from mnist_lab.dispatch import write_fastest
from mnist_lab.export import FLOAT_PRODUCTS, Dispatch, export_onnx
from mnist_lab.files import sha256
from mnist_lab.lab import Lab, check_owner, identity, load_parent
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import EveryExpert, SparseMoE
from mnist_lab.records import TABLE_BATCHES
from mnist_lab.rows import Quantized, Rounded, Row
from mnist_lab.runtimes import Precision, RuntimeName, open_session, why_missing


def round_row(lab: Lab, row: Rounded, seed: int) -> None:
    """Round the parent's weights to BF16 and write checkpoint and artifact."""
    model = round_weights(load_parent(lab, row.parent, seed))
    save_checkpoint(lab.output(row, seed), model, identity(lab, row, seed) | _lineage(lab, row, seed))
    ensure_artifact(lab, row.model, seed, precision=row.precision)


def quantize_row(lab: Lab, row: Quantized, seed: int) -> None:
    """Convert the parent to INT8 and write it."""
    parent = load_parent(lab, row.parent, seed)
    ensure_artifact(lab, row.parent, seed)
    calibration = None
    if row.mode == "static":
        calibration = _calibration_pixels(lab, row, seed).numpy()

    def write(path: Path, dispatch: Dispatch) -> None:
        with exported(parent, dispatch) as fp32_artifact:
            quantize(
                fp32_artifact,
                path,
                mode=row.mode,
                calibration=calibration,
                method=row.calibration.calibration_method,
                keep_float=FLOAT_PRODUCTS,
                metadata=identity(lab, row, seed) | _lineage(lab, row, seed),
            )

    _write_artifact(lab, lab.output(row, seed), parent, write, precision=row.precision)


def ensure_artifact(lab: Lab, model: str, seed: int, *, precision: Precision = "FP32") -> Path:
    """The ONNX file of a checkpoint, exported anew where it is missing or older than the checkpoint."""
    path, checkpoint = lab.artifact(model, seed), lab.checkpoint(model, seed)
    checkpoint_sha256 = sha256(checkpoint)
    if not path.exists() or read_onnx_metadata(path).get("parent_sha256") != checkpoint_sha256:
        loaded = load_checkpoint(checkpoint)
        owner = {key: loaded.metadata[key] for key in ("model", "dataset", "preset", "recipe", "seed")}
        metadata = owner | {"parent_sha256": checkpoint_sha256}

        def write(path: Path, dispatch: Dispatch) -> None:
            export_onnx(loaded.model, path, metadata, dispatch=dispatch)

        _write_artifact(lab, path, loaded.model, write, precision=precision)
    return path


def artifact_of(lab: Lab, row: Row, seed: int) -> Path:
    """The ONNX file to deploy: exported where it is due, or itself the row's output."""
    if isinstance(row, Quantized):
        return lab.output(row, seed)
    return ensure_artifact(lab, row.model, seed, precision=row.precision)


def ensure_program(lab: Lab, row: Quantized, seed: int) -> Path:
    """The INT8 program for PyTorch of the same parent and settings, made where it is missing or stale."""
    from mnist_lab.compress.pt2e import quantize_program, read_program_metadata

    path = lab.file(row.model, seed, "torchao")
    metadata = identity(lab, row, seed) | _lineage(lab, row, seed)
    if path.exists():
        found = read_program_metadata(path)
        check_owner(lab, path, row.model, found)
        if found == metadata:
            return path
    parent = load_parent(lab, row.parent, seed)
    model = EveryExpert(parent) if isinstance(parent, SparseMoE) else parent
    quantize_program(model, path, mode=row.mode, calibration=_calibration_pixels(lab, row, seed), metadata=metadata)
    return path


def ensure_file(lab: Lab, row: Row, seed: int, runtime: RuntimeName) -> Path:
    """What a runtime loads of a finished row, converted where it is due."""
    path = lab.file(row.model, seed, runtime)
    if path == lab.artifact(row.model, seed):
        return artifact_of(lab, row, seed)
    if isinstance(row, Quantized):
        return ensure_program(lab, row, seed)
    return path


def _calibration_pixels(lab: Lab, row: Quantized, seed: int) -> Tensor:
    return calibration_pixels(lab.dataset.train, row.calibration.calibration_size, seed=seed)


def _lineage(lab: Lab, row: Quantized | Rounded, seed: int) -> dict[str, str]:
    return {"parent_sha256": sha256(lab.checkpoint(row.parent, seed))}


@contextmanager
def exported(model: FFN | SparseMoE, dispatch: Dispatch) -> Iterator[Path]:
    """A passing FP32 artifact of `model` in one form."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp32.onnx"
        export_onnx(model, path, {}, dispatch=dispatch)
        yield path


def _write_artifact(
    lab: Lab,
    path: Path,
    model: FFN | SparseMoE,
    write: Callable[[Path, Dispatch], None],
    *,
    precision: Precision,
) -> None:
    """An MoE's artifact in the form that is fastest here; a dense model's in its only one."""
    if not isinstance(model, SparseMoE):
        write(path, "sparse")
        return
    # ONNX Runtime has no BF16 products on this kind of CPU; without the runtime that has, FP32 must do as a guide.
    runtime: RuntimeName = "openvino" if precision == "BF16" and not why_missing("openvino") else "onnxruntime"
    open_file = functools.partial(open_session, runtime, precision=precision, threads=1)
    write_fastest(path, write, open_file, lab.dataset.train.numpy()[0][: max(TABLE_BATCHES)])
