"""One data set, preset and recipe, and the two folders that hold what comes of them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from mnist_lab.data import Dataset, Split, load_dataset
from mnist_lab.experiments.row import departures
from mnist_lab.files import sha256
from mnist_lab.models import PRESETS, Preset, PresetName
from mnist_lab.report.columns import COLUMNS, Column
from mnist_lab.report.records import CLAIMS_FOLDER
from mnist_lab.runtimes import RuntimeName
from mnist_lab.sources import DatasetName
from mnist_lab.training import Recipe, RecipeName, find_recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Lab:
    """Where runs happen: all that they share."""

    dataset: Dataset
    preset_name: PresetName
    recipe_name: RecipeName
    recipe: Recipe
    checkpoints: Path  # …/<dataset>-<preset>-<recipe>
    results: Path
    device: str = "cpu"
    train_threads: int | None = None  # that every model must have been trained on; None: as it comes
    threads: int = 1  # of latency measurements
    latency: bool = True  # whether it is measured
    log: bool = False  # whether trainings are written for TensorBoard
    runtimes: tuple[RuntimeName, ...] = ("pytorch", "onnxruntime")  # to measure in, where a row can run there
    columns: tuple[Column, ...] = COLUMNS
    data_dir: Path | None = None  # where other data sets are looked for
    _computed: dict[tuple[str, str], Any] = field(default_factory=dict, compare=False, repr=False)
    _other_labs: dict[tuple[str, PresetName], "Lab"] = field(default_factory=dict, compare=False, repr=False)

    @property
    def preset(self) -> Preset:
        return PRESETS[self.preset_name]

    @property
    def departures(self) -> str:
        """How departures from the named recipe show in the names of this lab's models."""
        return "".join(f"-{part}" for part in departures(self.recipe, find_recipe(self.recipe_name, self.preset_name)))

    @functools.cached_property
    def test(self) -> Split:
        """The test split, read from disk once, when the first finished model is measured."""
        return self.dataset.load_test()

    @property
    def folder(self) -> Path:
        """Of checkpoints, that which one run at a time writes: for claims the one around theirs."""
        return self.checkpoints.parent if self.checkpoints.name == CLAIMS_FOLDER else self.checkpoints

    def on(self, dataset: DatasetName | None = None, preset: PresetName | None = None) -> "Lab":
        """The same on another data set or with another preset, in its own folders; of what is None, this lab's own.

        What departs from the named recipe departs from the other preset's too.

        Raises:
            UserError: the data cannot be had.
        """
        key = dataset or self.dataset.name, preset or self.preset_name
        if key == (self.dataset.name, self.preset_name):
            return self
        if key not in self._other_labs:
            name, preset_name = key
            folder = f"{name}-{preset_name}-{self.recipe_name}"
            data_dir = None if name == "digits" else self.data_dir
            self._other_labs[key] = replace(
                self,
                dataset=self.dataset if name == self.dataset.name else load_dataset(name, data_dir),
                preset_name=preset_name,
                recipe=self._recipe_of(preset_name),
                checkpoints=_beside(self.checkpoints, folder),
                results=_beside(self.results, folder),
                _computed={},
            )
        return self._other_labs[key]

    def with_recipe(self, recipe: Recipe) -> "Lab":
        """The same with other departures from the named recipe."""
        return replace(self, recipe=recipe, _computed={}, _other_labs={})

    def _recipe_of(self, preset: PresetName) -> Recipe:
        usual = vars(find_recipe(self.recipe_name, self.preset_name))
        departing = {name: value for name, value in vars(self.recipe).items() if value != usual[name]}
        return replace(find_recipe(self.recipe_name, preset), **departing)

    def once(self, what: str, file: Path, compute: Callable[[], T]) -> T:
        """What `compute` makes of a file as it is now; for a file that has not changed it is not computed again."""
        key = what, sha256(file)
        if key not in self._computed:
            self._computed[key] = compute()
        found: T = self._computed[key]
        return found

    def for_claims(self) -> "Lab":
        """The same rows, with files in folders below, so that what only claims compare stays apart.

        That goes for the models too: claims train several seeds side by side, on fewer threads, which gives other bits.
        """
        return replace(
            self,
            checkpoints=self.checkpoints / CLAIMS_FOLDER,
            results=self.results / CLAIMS_FOLDER,
            _computed={},
            _other_labs={},
        )

    def file(self, run_name: str, extension: str) -> Path:
        """A model's file of one kind, by `<model>-seed<k>`."""
        return self.checkpoints / f"{run_name}.{extension}"


def _beside(folder: Path, name: str) -> Path:
    """The folder of another lab; of its claims, where this one is of claims."""
    return folder.parent.with_name(name) / CLAIMS_FOLDER if folder.name == CLAIMS_FOLDER else folder.with_name(name)
