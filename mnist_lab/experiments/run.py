"""A row for one seed: its files, whose they are, what they depend on, and whether they are up to date."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from mnist_lab.data import Dataset
from mnist_lab.deploy.artifacts import read_onnx_metadata
from mnist_lab.errors import UserError
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.row import Row, describe
from mnist_lab.experiments.technique import Work
from mnist_lab.files import as_json, reading, sha256
from mnist_lab.models import Model
from mnist_lab.models.checkpoints import load_checkpoint, read_metadata
from mnist_lab.models.ensemble import Ensemble
from mnist_lab.models.small import SmallShape
from mnist_lab.report.records import Count, Epoch, Parent, record_path
from mnist_lab.runtimes import RuntimeName


@dataclass(frozen=True)
class Provenance:
    """What a file says of how it came to be: whose it is, by which settings, of which files."""

    model: str
    dataset: str
    preset: str
    recipe: str
    seed: Count
    config: dict[str, Any]
    parents: dict[str, Parent] = field(default_factory=dict)  # of a run's own file, by role
    made_from: str | None = None  # of a file that derives from the run's weights: their SHA-256
    layout: dict[str, Any] | None = None  # of an MoE's artifact
    curves: list[Epoch] = field(default_factory=list)
    proof: dict[str, Any] = field(default_factory=dict)  # what a step did
    train_threads: Count | None = None
    device: str | None = None  # of training


@dataclass(frozen=True)
class Run:
    """One row of one lab for one seed."""

    lab: Lab
    row: Row
    seed: int

    @property
    def model(self) -> str:
        """The row's name, and this lab's departures from the recipe."""
        return self.row.name + self.lab.departures

    @property
    def name(self) -> str:
        return f"{self.model}-seed{self.seed}"

    def file(self, extension: str) -> Path:
        return self.lab.file(self.name, extension)

    @property
    def output(self) -> Path:
        """The file that is made first, and that others derive from."""
        return self.file(self.row.extension)

    @property
    def artifact(self) -> Path:
        """The file to deploy."""
        return self.file("onnx")

    @property
    def record(self) -> Path:
        return record_path(self.lab.results, self.name)

    @property
    def runtimes(self) -> list[RuntimeName]:
        """Where it is measured: where it was asked for, or if it runs in none of those, in its own first runtime."""
        own = self.row.runtimes
        return [runtime for runtime in own if runtime in self.lab.runtimes] or [own[0]]

    @property
    def parents(self) -> dict[str, "Run"]:
        """The runs that must be there first, by role: of a teacher of several seeds teacher, teacher+1, ..."""
        runs = {role: self._beside(row) for role, row in self.row.parents.items()}
        for ahead in range(1, self.row.teacher_seeds):
            runs[f"teacher+{ahead}"] = replace(runs["teacher"], seed=self.seed + ahead)
        return runs

    @property
    def original(self) -> "Run":
        """The first run of the chain of sources."""
        return self if self.row.source is None else self.parents["source"].original

    def _beside(self, row: Row) -> "Run":
        """Another row's run of the same seed, on its own data set and of its own preset where it names them."""
        lab = self.lab.on(row.dataset, row.preset)
        if row.dataset is not None:
            check_alike(lab.dataset, self.lab.dataset)
        return Run(lab, row, self.seed)

    @property
    def weights(self) -> "Run":
        """The run whose checkpoint this one's files are written from: its own, or for a form its source."""
        return self if self.row.step is not None else self.parents["source"]

    @property
    def images_of(self) -> Dataset | None:
        """The other data set whose images its step takes.

        Raises:
            UserError: it cannot be had, or its images are of another size.
        """
        if self.row.images_of is None:
            return None
        other = self.lab.on(self.row.images_of).dataset
        check_alike(other, self.lab.dataset, classes=False)
        return other

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that the row's file depends on, as JSON gives it back."""
        settings: dict[str, Any] = {"step": describe(self.row.step), "form": describe(self.row.form)}
        if self.row.step is not None:
            settings |= {
                "recipe": asdict(self.lab.recipe),
                "preset": asdict(self.lab.preset),
                "data": self.lab.dataset.spec.settings,
            }
        if self.images_of is not None:
            settings["images_of"] = self.images_of.spec.settings
        decoded: dict[str, Any] = as_json(settings)
        return decoded

    @property
    def owner(self) -> dict[str, Any]:
        """What each of its files says of whose it is."""
        return {
            "model": self.model,
            "dataset": self.lab.dataset.name,
            "preset": self.lab.preset_name,
            "recipe": self.lab.recipe_name,
            "seed": self.seed,
        }

    def lineage(self) -> dict[str, Parent]:
        """What was made of which files, by role: model, file as seen from the lab's checkpoints, SHA-256."""
        return {
            role: {
                "model": parent.model,
                "file": os.path.relpath(parent.output, self.lab.checkpoints),
                "sha256": sha256(parent.output),
            }
            for role, parent in self.parents.items()
        }

    def metadata(self, file: Path) -> dict[str, Any]:
        """What one of its files says of itself, when it is up to date."""
        says = self.owner | {"config": self.settings}
        if file == self.output:
            return says | {"parents": self.lineage()}
        return says | {"made_from": sha256(self.weights.output)}

    def why_stale(self) -> str | None:
        """Why the run's own file must be made anew: "missing", or "stale: …"; None where it is up to date.

        Raises:
            UserError: a file is broken, or belongs to another model, preset, recipe or data set: none is overwritten;
                or the row's shape does not fit the images.
        """
        shape = getattr(self.row.step, "shape", None)
        if isinstance(shape, SmallShape):
            shape.config(self.lab.dataset.spec)  # which it must fit
        for file in {self.artifact, self.output}:
            if file.exists():
                self.check_owner(file)
        if not self.output.exists():
            return "missing"
        found = read_provenance(self.output)
        for role, parent in self.parents.items():
            if reason := parent.why_stale():
                return f"stale: {parent.model} is {reason}"
            if role not in found.parents or found.parents[role]["sha256"] != sha256(parent.output):
                return f"stale: {parent.model} has changed since"
        if found.config != self.settings or found.parents.keys() != self.parents.keys():
            return "stale: made with other settings"
        threads = self.lab.train_threads
        if self.row.step is not None and threads is not None and found.train_threads != threads:
            return f"stale: trained on {found.train_threads} threads, not {threads}"
        return None

    def is_due(self, file: Path) -> bool:
        """Whether one of the files that derive from the run's weights is missing or not of these.

        Raises:
            UserError: as `why_stale`.
        """
        if not file.exists():
            return True
        self.check_owner(file)
        return not asdict(read_provenance(file)).items() >= self.metadata(file).items()

    def check_owner(self, file: Path) -> None:
        """Raise UserError where a file lies in the place of another model, preset, recipe, data set or seed."""
        found = asdict(read_provenance(file))
        for key, expected in self.owner.items():
            if found[key] != expected:
                raise UserError(
                    f"{file} belongs to {key} {found[key]}, not {expected}. "
                    "Move it away, or name another folder with --checkpoints."
                )

    def load(self) -> Model:
        """The model in the run's own checkpoint."""
        return load_checkpoint(self.output).model

    def load_parents(self) -> dict[str, Model]:
        """The models that its technique starts from, by role."""
        return {role: parent.load() for role, parent in self.parents.items()}

    def work(self, parents: Mapping[str, Model] = MappingProxyType({})) -> Work:
        """What its technique may see."""
        lab, source = self.lab, parents.get("source")
        teachers = [model for role, model in parents.items() if role != "source"]
        teacher = Ensemble(teachers) if len(teachers) > 1 else next(iter(teachers), None)
        basis = lab.dataset, lab.preset, lab.recipe, self.seed, lab.device, self.model
        return Work(*basis, source, teacher, self.images_of)


def check_alike(other: Dataset, own: Dataset, *, classes: bool = True) -> None:
    """Raise UserError where images of another data set are of another size, or there are not as many classes."""
    for what, name in (("pixels (height x width)", "image_size"), ("classes", "num_classes")):
        theirs, ours = getattr(other.spec, name), getattr(own.spec, name)
        if theirs != ours and (classes or name == "image_size"):
            its, needed = ("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in (theirs, ours))
            raise UserError(f"{other.name} has {its} {what}, {own.name} {needed}: the two must be alike for this")


def read_provenance(file: Path) -> Provenance:
    """What a checkpoint or an artifact says of itself.

    Raises:
        UserError: it is missing, damaged, or not this suite's.
    """
    metadata = read_onnx_metadata(file) if file.suffix == ".onnx" else read_metadata(file)
    with reading(file):
        return msgspec.convert(metadata, Provenance)
