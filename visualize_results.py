"""Draw the plots again from the records on disk; nothing is trained or measured.

python visualize_results.py                                           # every folder below results/
python visualize_results.py --results results/mnist-compact-standard  # one folder: expect 11 plots a folder
python visualize_results.py --dataset mnist --recipe quick            # those that fit
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mnist_lab.command.entry import DatasetText, Folder, run_script
from mnist_lab.errors import FolderInUse, RunFailed, UserError
from mnist_lab.folders import only_run_in
from mnist_lab.machine import cpu_model
from mnist_lab.own_data import DATASET_TEXTS, find_own, is_filed_name
from mnist_lab.report.records import CLAIMS_FOLDER, RECORD_PATTERN, Record, load_records, usable_records
from mnist_lab.report.text import read_run_names
from mnist_lab.sources import DATASETS

# As in models/ and training.py, which import torch.
PresetName = Literal["compact", "wide"]
RecipeName = Literal["quick", "standard", "best"]


@dataclass(frozen=True)
class PlotOptions:
    results: Folder = Path("results")
    """A results folder, or a folder that holds several."""
    checkpoints: Folder = Path("checkpoints")
    """Folder for trained and converted models. Where it has none of a results folder's, they are not checked."""
    dataset: DatasetText | None = None
    """Draw only this data set; own data by where it lies, or by the name that it is filed under."""
    preset: PresetName | None = None
    """Draw only this set of architectures."""
    recipe: RecipeName | None = None
    """Draw only this training budget."""

    def __post_init__(self) -> None:
        name = self.dataset
        if name is not None and name not in DATASETS and find_own(name) is None and not is_filed_name(name):
            raise UserError(f"--dataset {name} is none of {', '.join(DATASET_TEXTS)}, or a name that own data has")

    def find_data(self) -> re.Pattern[str]:
        """The names of data sets that pass; of own data those of any size of its images.

        Raises:
            UserError: own data cannot be read.
        """
        own = find_own(self.dataset) if self.dataset else None
        if own is not None:
            return re.compile(rf"{re.escape(own.find_name())}(-\d+x\d+)?")
        return re.compile(".*" if self.dataset is None else re.escape(self.dataset))

    def admits(self, record: Record, data: re.Pattern[str]) -> bool:
        """Whether a record passes every filter that is given."""
        wanted = ((self.preset, record.preset), (self.recipe, record.recipe))
        return data.fullmatch(record.dataset) is not None and all(want in {None, have} for want, have in wanted)

    @property
    def filters(self) -> str:
        given = {"dataset": self.dataset, "preset": self.preset, "recipe": self.recipe}
        return " and ".join(f"--{name} {value}" for name, value in given.items() if value)


def find_folders(root: Path) -> list[Path]:
    """`root` and the folders below it that hold records.

    Raises:
        UserError: there is none.
    """
    folders = sorted({path.parent.parent for path in root.rglob(f"runs/{RECORD_PATTERN}")})
    if not folders:
        raise UserError(
            f"no records (runs/*.json) in {root}; make some with run_all_experiments.py, or name another --results"
        )
    return folders


def choose_records(folder: Path, records: list[Record], checkpoints: Path) -> list[Record]:
    """Those that a table may take too; says of each other why it may not.

    Raises:
        UserError: none is left.
    """
    name, parent = folder.absolute().name, folder.absolute().parent.name
    own = checkpoints / parent / name if name == CLAIMS_FOLDER else checkpoints / name
    cpus = [record.machine["cpu"] for record in records]
    cpu = cpu_model() if cpu_model() in cpus else cpus[0]
    in_table = read_run_names(folder)
    current = [record for record in records if record.run_name in in_table]
    usable, left_out = usable_records(records, own if own.is_dir() else None, cpu, current=current)
    for line in left_out:
        print(f"not drawn: {line}")
    if not usable:
        raise UserError(f"no record in {folder} can be drawn; make them again with run_all_experiments.py")
    return usable


@contextlib.contextmanager
def alone_where_possible(folder: Path) -> Iterator[None]:
    """What killed runs left goes, unless a run is at work: what it has finished can be drawn all the same."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FolderInUse):
            stack.enter_context(only_run_in(folder.parent if folder.name == CLAIMS_FOLDER else folder))
        yield


def draw(folder: Path, records: list[Record]) -> Iterator[Path]:
    """The figures of a results folder; one of claims has its own."""
    # Imported once there is something to draw: the rows, which give the order, bring torch.
    from mnist_lab.experiments.rows import ORDER
    from mnist_lab.report.curve import write_curve
    from mnist_lab.report.figures import draw_all
    from mnist_lab.report.results import Results
    from mnist_lab.studies.claims.draw import SUITES, draw_claims

    if folder.absolute().name == CLAIMS_FOLDER:
        return draw_claims(folder, records, *SUITES)
    results = Results(records, ORDER)
    if curve := write_curve(folder, results):
        print(f"curve: {curve}", flush=True)
    return draw_all(folder, results)


def main(options: PlotOptions) -> None:
    folders, data = find_folders(options.results), options.find_data()
    failures: list[UserError | RunFailed] = []
    is_any_admitted = False
    for folder in folders:
        try:
            records = [record for record in load_records(folder) if options.admits(record, data)]
            if records:
                is_any_admitted = True
                with alone_where_possible(folder):
                    for path in draw(folder, choose_records(folder, records, options.checkpoints)):
                        print(f"plot: {path}", flush=True)
        except (UserError, RunFailed) as error:  # the other folders do not hang on it
            failures.append(error)
    if failures:
        kind = RunFailed if any(isinstance(failure, RunFailed) for failure in failures) else UserError
        raise kind("; ".join(str(failure) for failure in failures))
    if not is_any_admitted:
        found = ", ".join(str(folder) for folder in folders)
        raise UserError(f"none of the records in {options.results} is of {options.filters}; there are: {found}")


if __name__ == "__main__":
    run_script(main, PlotOptions, __doc__)
