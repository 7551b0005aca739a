"""A row of the table: a step or a form, the rows that it needs first, and its name."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from mnist_lab.compress.float32 import Float32
from mnist_lab.compress.prune_weights import PruneWeights
from mnist_lab.compress.synthetic import DistilOnImages
from mnist_lab.experiments.technique import Form, Step
from mnist_lab.models import PresetName
from mnist_lab.models.small import SmallShape
from mnist_lab.runtimes import EXTENSIONS, RuntimeName
from mnist_lab.sources import DatasetName


@dataclass(frozen=True)
class Row:
    """Exactly one of a step, and a form other than FP32 of what its source's step made."""

    family: str  # its place in the table, and the first part of its name
    step: Step | None = None
    source: Optional["Row"] = None  # whose weights it starts from or puts into another form
    teacher: Optional["Row"] = None  # whom it learns from
    form: Form = field(default_factory=Float32)
    variant: str = ""  # names what differs from the family's first row beyond the settings of step and form
    teacher_seeds: int = 1  # of the teacher, from the row's own upward, that teach together
    preset: PresetName | None = None  # whose files it is one of, where a row of another preset starts or learns from it
    dataset: DatasetName | None = None  # whose files it is one of, where a row on other data starts or learns from it

    def __post_init__(self) -> None:
        is_float32 = type(self.form) is Float32
        assert is_float32 if self.step is not None else self.source is not None and not is_float32
        assert self.teacher_seeds >= 1 if self.teacher is not None else self.teacher_seeds == 1
        assert all(parent.extension == "safetensors" for parent in self.parents.values())

    @property
    def name(self) -> str:
        """The family, then what departs from the defaults, its parents' departures last.

        Those of a step that follows another are told apart from what it inherits by "+": a chain's first step stands
        last, and one with no departures leaves its place empty.
        """
        own = "".join(f"-{part}" for part in [self.variant, *departures(self.step), *departures(self.form)] if part)
        inherited = "".join(parent.name.removeprefix(parent.family) for parent in self.parents.values())
        if inherited and self._follows_a_step:
            inherited = "+" + inherited.removeprefix("-")
        return self.family + own + inherited

    @property
    def _follows_a_step(self) -> bool:
        return self.step is not None and self.source is not None and self.source.source is not None

    @property
    def parents(self) -> dict[str, "Row"]:
        """The rows that must be there first, by role; of a teacher of several seeds its row once."""
        roles = {"source": self.source, "teacher": self.teacher}
        return {role: row for role, row in roles.items() if row is not None}

    @property
    def images_of(self) -> DatasetName | None:
        """Another data set, whose images its step takes."""
        return self.step.images_of if isinstance(self.step, DistilOnImages) else None

    @property
    def extension(self) -> str:
        """Of the file that is made first: what the first of the runtimes loads."""
        return EXTENSIONS[self.form.runtimes[0]]

    @property
    def runtimes(self) -> tuple[RuntimeName, ...]:
        """That can run it: those of its form, and where most of its weights are zero the one that skips them."""
        own = self.form.runtimes
        if self._looks_through_windows:  # whose INT8 torch.compile leaves partly in float, one image at a time
            own = tuple(runtime for runtime in own if runtime != "torchao")
        return (*own, "torch-sparse") if isinstance(self.step, PruneWeights) else own

    @property
    def _looks_through_windows(self) -> bool:
        if self.source is not None:
            return self.source._looks_through_windows
        shape = getattr(self.step, "shape", None)
        return isinstance(shape, SmallShape) and bool(shape.windows)

    @property
    def technique(self) -> str:
        """The labels along the chain, joined; a model that was only trained is dense."""
        return " + ".join(self._labels()) or "dense"

    def _labels(self) -> Iterator[str]:
        if self.source is not None:
            yield from self.source._labels()
        yield from filter(None, [self.step.label if self.step else "", self.form.label])


def departures(config: Any, usual: Any = None) -> list[str]:
    """`T10` for each field that differs from its default, or from that of `usual`; no field without either."""
    found: list[str] = []
    for setting in dataclasses.fields(config) if config is not None else ():
        tag, value = setting.metadata.get("tag", setting.name), getattr(config, setting.name)
        default = _default(setting) if usual is None else getattr(usual, setting.name)
        if tag is None or default is dataclasses.MISSING or value == default:
            continue
        nested = dataclasses.is_dataclass(value)
        found += departures(value, default if type(default) is type(value) else None) if nested else [_text(tag, value)]
    return found


def _default(setting: "dataclasses.Field[Any]") -> Any:
    if setting.default_factory is not dataclasses.MISSING:
        return setting.default_factory()
    return setting.default


def _text(tag: str, value: object) -> str:
    """Tag and value, as text that no other value shares: 10.0 as 10; of what is left out that."""
    if value is None:
        return f"no-{tag}"
    return tag + (str(int(value)) if isinstance(value, float) and value.is_integer() else str(value))


def describe(technique: Step | Form | None) -> dict[str, Any] | None:
    """All settings of a step or form, from its own fields."""
    if technique is None:
        return None
    fields: dict[str, Any] = dataclasses.asdict(technique)  # type: ignore[call-overload]
    return {"kind": type(technique).__name__, **fields}
