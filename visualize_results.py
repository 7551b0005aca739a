"""Write the tables and draw the plots again from the records on disk; nothing is trained or measured.

python visualize_results.py                                           # every folder below results/
python visualize_results.py --results results/mnist-compact-standard  # one folder: expect 11 plots a folder
python visualize_results.py --dataset mnist --recipe quick            # those that fit
python visualize_results.py --report                                  # report.html too, with a live demo (make report)

Records of other machines stand in the same table, their latencies do not: docs/sweeps.md
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mnist_lab.command.entry import DatasetText, Folder, run_script
from mnist_lab.command.redraw import alone_where_possible, choose_records, draw, fetch_engine, find_folders, report
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.own_data import DATASET_TEXTS, find_own, is_filed_name
from mnist_lab.report.records import CLAIMS_FOLDER, Record, load_records
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
    def own_data(self) -> str | None:
        """Where own data lie, if the option says it."""
        return self.dataset if self.dataset and find_own(self.dataset) else None

    @property
    def filters(self) -> str:
        given = {"dataset": self.dataset, "preset": self.preset, "recipe": self.recipe}
        return " and ".join(f"--{name} {value}" for name, value in given.items() if value)


def redraw(folder: Path, records: list[Record], options: PlotOptions) -> Iterator[str]:
    """What is written into a results folder, a line each; one of claims has figures of its own, and no page."""
    if folder.absolute().name == CLAIMS_FOLDER:
        from mnist_lab.studies.claims.draw import SUITES, draw_claims  # brings torch

        yield from (f"plot: {path}" for path in draw_claims(folder, records, *SUITES))
        return
    yield from (f"plot: {path}" for path in draw(folder, records, options.checkpoints))
    if options.report:
        page = report(folder, records, options.checkpoints, data_dir=options.data_dir, own_data=options.own_data)
        yield f"report: {page}"


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
                    for line in redraw(folder, chosen, options):
                        print(line, flush=True)
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
