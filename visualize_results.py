"""Write the tables and draw the plots again from the records on disk; nothing is trained or measured.

python visualize_results.py                                           # every folder below results/
python visualize_results.py --results results/mnist-compact-standard  # one folder: expect 11 plots a folder
python visualize_results.py --dataset mnist --recipe quick            # those that fit
python visualize_results.py --report                                  # report.html too, with a live demo (make report)

Records of other machines stand in the same table, their latencies do not: docs/sweeps.md
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mnist_lab.command.entry import DatasetText, Folder, run_script
from mnist_lab.errors import FolderInUse, RunFailed, UserError
from mnist_lab.folders import only_run_in
from mnist_lab.machine import cpu_model
from mnist_lab.own_data import DATASET_TEXTS, find_own, find_size, is_filed_name
from mnist_lab.report.records import CLAIMS_FOLDER, RECORD_PATTERN, Record, load_records, timed_on, usable_records
from mnist_lab.report.table import judge_distillation
from mnist_lab.report.text import read_run_names, title_of, write_table
from mnist_lab.report.winner import find_winners, write_up_winners
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
    report: bool = False
    """Write report.html too. The models it runs need npm once, which fetches an engine for browsers into .cache/."""
    data_dir: Folder | None = None
    """For the images of the report: folder that holds MNIST/raw/ and the like; when not given, $MNIST_LAB_DATA, else
    ./data (downloaded into)."""

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
    in_table = read_run_names(folder)
    current = [record for record in records if record.run_name in in_table]
    usable, left_out = usable_records(records, own if own.is_dir() else None, cpu_model(), current=current)
    usable, not_timed = timed_on(choose_cpu(usable), usable)
    for line in [*left_out, *not_timed]:
        print(f"not drawn: {line}")
    if not usable:
        raise UserError(f"no record in {folder} can be drawn; make them again with run_all_experiments.py")
    return usable


def choose_cpu(records: Sequence[Record]) -> str:
    """Whose latencies are shown: this CPU's, or where none of it is there, the first one's."""
    timed = [record.timed_on(name) for record in records for name, own in record.measurements.items() if own.latency_ms]
    return cpu_model() if cpu_model() in timed else next(iter(timed), cpu_model())


@contextlib.contextmanager
def alone_where_possible(folder: Path) -> Iterator[None]:
    """What killed runs left goes, unless a run is at work: what it has finished can be drawn all the same."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FolderInUse):
            stack.enter_context(only_run_in(folder.parent if folder.name == CLAIMS_FOLDER else folder))
        yield


def draw(folder: Path, records: list[Record], checkpoints: Path) -> Iterator[Path]:
    """The table and the figures of a results folder; one of claims has figures of its own."""
    # Imported once there is something to draw: the rows, which give the order, bring torch.
    from mnist_lab.experiments.rows import ORDER
    from mnist_lab.report.curve import write_curve
    from mnist_lab.report.figures import draw_all
    from mnist_lab.report.results import Results
    from mnist_lab.studies.claims.draw import SUITES, draw_claims

    if folder.absolute().name == CLAIMS_FOLDER:
        return draw_claims(folder, records, *SUITES)
    results = Results(records, ORDER)
    first = records[0]
    title = title_of(first.dataset, first.preset, first.recipe)
    own = checkpoints / folder.absolute().name
    sections = {"What to deploy": write_up_winners(find_winners(records), own if own.is_dir() else Path())}
    write_table(folder, results.table, title=title, distillation=judge_distillation(records), sections=sections)
    print(f"table: {folder / 'table.csv'} and table.md", flush=True)
    if curve := write_curve(folder, results):
        print(f"curve: {curve}", flush=True)
    return draw_all(folder, results)


def report(folder: Path, records: list[Record], options: PlotOptions) -> Path:
    """One page of a results folder."""
    from mnist_lab.command.report import write_report
    from mnist_lab.data import load_dataset
    from mnist_lab.experiments.rows import ORDER
    from mnist_lab.report.results import Results

    checkpoints, dataset = options.checkpoints / folder.absolute().name, records[0].dataset
    data_dir = options.data_dir if dataset in DATASETS and dataset != "digits" else None
    size = None
    if options.dataset and find_own(options.dataset):
        dataset, size = options.dataset, find_size(dataset)
    return write_report(
        folder, Results(records, ORDER), checkpoints, lambda: load_dataset(dataset, data_dir, size).load_test()
    )


def fetch_engine() -> None:
    """Says why there will be no demo."""
    from mnist_lab.runtimes.onnxruntime_web import fetch_runtime

    if reason := fetch_runtime():
        print(f"reports without a demo: {reason}", flush=True)


def main(options: PlotOptions) -> None:
    folders, data = find_folders(options.results), options.find_data()
    if options.report:
        fetch_engine()
    failures: list[UserError | RunFailed] = []
    is_any_admitted = False
    for folder in folders:
        try:
            records = [record for record in load_records(folder) if options.admits(record, data)]
            if records:
                is_any_admitted = True
                with alone_where_possible(folder):
                    chosen = choose_records(folder, records, options.checkpoints)
                    for path in draw(folder, chosen, options.checkpoints):
                        print(f"plot: {path}", flush=True)
                    if options.report and folder.absolute().name != CLAIMS_FOLDER:
                        print(f"report: {report(folder, chosen, options)}", flush=True)
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
