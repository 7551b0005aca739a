"""Tables, figures and pages made again from the records on disk. Torch only where something is drawn."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from mnist_lab.errors import FolderInUse, UserError
from mnist_lab.folders import only_run_in
from mnist_lab.machine import cpu_model
from mnist_lab.own_data import find_size
from mnist_lab.report.records import CLAIMS_FOLDER, RECORD_PATTERN, Record, timed_on, usable_records
from mnist_lab.report.table import judge_distillation
from mnist_lab.report.text import read_run_names, title_of, write_table
from mnist_lab.report.winner import find_winners, write_up_winners
from mnist_lab.sources import DATASETS


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
    """The table and the figures of a results folder."""
    # Imported once there is something to draw: the rows, which give the order, bring torch.
    from mnist_lab.experiments.rows import ORDER
    from mnist_lab.report.curve import write_curve
    from mnist_lab.report.figures import draw_all
    from mnist_lab.report.results import Results

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


def report(
    folder: Path, records: list[Record], checkpoints: Path, *, data_dir: Path | None, own_data: str | None
) -> Path:
    """One page of a results folder.

    Args:
        data_dir: of the suite's data sets, for the images.
        own_data: where own data lie, as an option says it.
    """
    from mnist_lab.command.report import write_report
    from mnist_lab.data import load_dataset
    from mnist_lab.experiments.rows import ORDER
    from mnist_lab.report.results import Results

    dataset, size = records[0].dataset, None
    data_dir = data_dir if dataset in DATASETS and dataset != "digits" else None
    if own_data is not None:
        dataset, size = own_data, find_size(dataset)
    own = checkpoints / folder.absolute().name
    return write_report(folder, Results(records, ORDER), own, lambda: load_dataset(dataset, data_dir, size).load_test())


def fetch_engine() -> None:
    """Says why there will be no demo."""
    from mnist_lab.runtimes.onnxruntime_web import fetch_runtime

    if reason := fetch_runtime():
        print(f"reports without a demo: {reason}", flush=True)
