"""Which trained model a script starts from: one of the usual ones, or any row that has a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from mnist_lab.command.options import RowOptions
from mnist_lab.errors import UserError
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.pipeline import Chain, chain_from, check_name
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import MOE, SOURCES, SourceName
from mnist_lab.experiments.trained import Trained, find_trained
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.sources import DatasetName


@dataclass(frozen=True)
class SourceOptions(RowOptions):
    """What a script takes that makes a row of a trained one."""

    usual: ClassVar[SourceName] = "moe"  # where no source is given

    source: str | None = None
    """Trained model to start from in place of the usual one, by the name of its checkpoint without the seed, as
    Sparse_MoE-E8-K1 or KD_FFN_Student-T10 (docs/variants.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is None:
            self.row_from(self.usual_chain)

    @property
    def usual_name(self) -> SourceName:
        return self.usual

    @property
    def source_name(self) -> str:
        """As it is given, or left out."""
        return self.source or self.usual_name

    @property
    def usual_chain(self) -> Chain:
        """The usual model to start from, and what is known of it without its file."""
        row = SOURCES[self.usual_name]
        return Chain((row,), RoutingConfig().num_experts if row == MOE else 1)

    def row_from(self, source: Chain) -> Row:
        """What becomes of a trained row.

        Raises:
            UserError: the options do not fit it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ModelOptions(SourceOptions):
    """The same, of a technique that takes dense models too."""

    model: SourceName | None = None
    """Trained model to start from (when neither this nor --source is given, moe); student is KD_FFN_Student."""

    def __post_init__(self) -> None:
        if self.model is not None and self.source is not None:
            raise UserError(f"--model {self.model} and --source {self.source} each name a model: drop one of them")
        super().__post_init__()

    @property
    def usual_name(self) -> SourceName:
        return self.model or self.usual


class Start(NamedTuple):
    """What a script makes, and of what."""

    lab: Lab  # with what departs from the recipe in the source's name
    source: Row
    row: Row


def start(lab: Lab, options: SourceOptions, dataset: DatasetName | None = None) -> Start:
    """The row that the options ask for.

    Args:
        dataset: that its source was trained on; the lab's when not given.

    Raises:
        UserError: --source is no trained row of the lab, or the other options do not fit it.
    """
    if options.source is None:
        return Start(lab, options.usual_chain.last, options.row_from(options.usual_chain))
    found = find_named(lab, options.source, options.seed, "--source", dataset)
    with naming(f"--source {options.source}"):
        row = options.row_from(chain_from(found.row, found.config))
        check_name(row)
    return Start(found.lab, found.row, row)


def find_named(lab: Lab, name: str, seed: int, option: str, dataset: DatasetName | None = None) -> Trained:
    """A trained row that an option names; says where the recipe is taken over from it.

    Raises:
        UserError: there is no such row in the lab, or its recipe departs otherwise.
    """
    with naming(option):
        found = find_trained(lab, name, seed, dataset=dataset)
    if found.lab.departures != lab.departures:
        departures = found.lab.departures.removeprefix("-")
        print(f"{option} {name}: trained with {departures}, and so is what becomes of it", flush=True)
    return found


@contextmanager
def naming(given: str) -> Iterator[None]:
    """Say in errors which option they are of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{given}: {error}") from error
