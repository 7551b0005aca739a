"""A killed training goes on from its last finished epoch: its state lies in a file beside the checkpoint to come."""

import glob
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.run import Run
from mnist_lab.files import as_json
from mnist_lab.machine import cpu_model, package_version
from mnist_lab.models.checkpoints import read_tensors, save_tensors
from mnist_lab.training import EpochMetrics, Kept


def keepers(run: Run) -> Iterator["FileKeeper"]:
    """For each training that a run's step does, in turn."""
    bound = as_json(
        {
            "run": run.metadata(run.output),
            "data": run.lab.dataset.fingerprint,
            "images": run.images_of.fingerprint if run.images_of is not None else None,
            "threads": torch.get_num_threads(),
            "device": run.lab.device,
            "torch": package_version("torch"),
            "cpu": cpu_model(),
        }
    )
    return (FileKeeper(run.file(f"fit{number}.safetensors"), bound) for number in itertools.count(1))


def forget(run: Run) -> None:
    """Remove what was kept of a run's trainings."""
    for path in run.lab.checkpoints.glob(f"{glob.escape(run.name)}.fit*.safetensors"):
        path.unlink(missing_ok=True)


@dataclass
class FileKeeper:
    """One training's state in one file, with all that the training's bits depend on."""

    path: Path
    bound: Mapping[str, Any]

    def restore(self, like: Mapping[str, Tensor]) -> Kept | None:
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_tensors(self.path)
            curves = msgspec.convert(metadata["curves"], list[EpochMetrics])
        except (UserError, KeyError, msgspec.ValidationError) as error:
            print(f"{error}\nThe training starts anew.", flush=True)
            return None
        bound = metadata.get("bound") or {}
        different = [key for key in self.bound if bound.get(key) != self.bound[key]]
        if different or _outline(tensors) != _outline(like):
            reason = ", ".join(different) or "weights"
            print(f"{self.path.name} is of a training with other {reason}; this one starts anew", flush=True)
            return None
        print(f"{self.path.name}: going on after epoch {len(curves)}", flush=True)
        return Kept(tensors, curves)

    def keep(self, kept: Kept) -> None:
        metadata = {"bound": self.bound, "curves": [asdict(epoch) for epoch in kept.curves]}
        try:
            save_tensors(self.path, kept.tensors, metadata)
        except RunFailed as error:  # the training itself may well find its place in the end
            print(f"{error}; were it killed, this training would start anew", flush=True)


def _outline(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
