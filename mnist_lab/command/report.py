"""The page of a results folder: what it shows beside the records, gathered as far as it is at hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mnist_lab.data import Split
from mnist_lab.errors import UserError
from mnist_lab.experiments.curve_rows import CURVE
from mnist_lab.experiments.demo import find_routes, make_demo
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import COMPRESSION, STUDENTS, TABLE
from mnist_lab.models import PresetName
from mnist_lab.own_data import find_size
from mnist_lab.report.findings import load_findings
from mnist_lab.report.page import Surroundings, write_page
from mnist_lab.report.page_demo import Demo
from mnist_lab.report.page_images import TestImages
from mnist_lab.report.records import Record
from mnist_lab.report.results import Results, listed
from mnist_lab.runtimes.onnxruntime_web import find_runtime
from mnist_lab.sources import DATASETS
from mnist_lab.training import RecipeName, find_recipe

USUAL = "models"
SUITES: dict[str, Sequence[Row]] = {USUAL: TABLE, "compression": COMPRESSION, "students": STUDENTS, "curve": CURVE}


def write_report(folder: Path, results: Results, checkpoints: Path, load_test: Callable[[], Split]) -> Path:
    """Write `report.html` into a results folder. Nothing is fetched.

    Args:
        checkpoints: of the models; without their files there is no demo.
        load_test: the test split; where it cannot be had the page has no images.

    Raises:
        RunFailed: it cannot be written.
    """
    demo, why_none = _make_demo(results, checkpoints)
    surroundings = Surroundings(
        findings=load_findings(folder),
        images=_find_images(results, checkpoints, load_test),
        demo=demo,
        demo_missing=why_none,
        commands=find_commands(results.records),
    )
    return write_page(folder, results, surroundings)


def _make_demo(results: Results, checkpoints: Path) -> tuple[Demo | None, str]:
    """The demo, or why there is none."""
    try:
        engine = find_runtime()
        if engine is None:
            return None, "`make report` fetches the engine for browsers that it needs"
        return make_demo(checkpoints, results.models, engine), ""
    except UserError as error:
        return None, str(error).rstrip(".")


def _find_images(results: Results, checkpoints: Path, load_test: Callable[[], Split]) -> TestImages | None:
    try:
        pixels, labels = load_test().numpy()
    except UserError as error:
        print(f"the report has no images: {error}", flush=True)
        return None
    experts = find_routes(checkpoints, results.models, pixels)
    return TestImages(np.round(255 * pixels[:, 0]).astype(np.uint8), labels.astype(np.uint8), experts)


def find_commands(records: Sequence[Record]) -> list[str]:
    """What makes all these models again, a line for each suite that it takes."""
    first, made = records[0], {record.row for record in records}
    names = {suite: {row.name for row in rows} for suite, rows in SUITES.items()}
    suites = [suite for suite in names if made & (names[suite] - names[USUAL])]
    others = made - set().union(*names.values())
    usual = made & names[USUAL] - set().union(*(names[suite] for suite in suites))
    if usual and len(usual) < len(others):  # a sweep's, of which some are usual by chance
        others, usual = others | usual, set()
    if usual or not (suites or others):
        suites.insert(0, USUAL)
    seeds = sorted({record.seed for record in records})
    measured = [measurement for record in records for measurement in record.measurements.items()]
    runtimes = [name for name in dict.fromkeys(name for name, _ in measured) if name != "torch-sparse"]
    threads = {own.threads for _, own in measured if own.threads}
    data, comment = _describe_data(first.dataset)
    options = [f"{data} --preset {first.preset} --recipe {first.recipe}", *_departures(records)]
    options += [f"--seed {seeds[0]}"] if seeds[0] else []
    options += [f"--seeds {len(seeds)}"] if len(seeds) > 1 else []
    options += [f"--threads {max(threads)}"] if threads else []
    options.append(f"--runtime {' '.join(runtimes)}{comment}")
    commands = [
        " ".join(["python run_all_experiments.py --mode load", f"--suite {suite}", *options]) for suite in suites
    ]
    if others:
        commands.append(f"# by other options of the scripts, or a sweep: {listed(sorted(others))}")
    return commands


def _describe_data(filed: str) -> tuple[str, str]:
    """The options for data that are filed by that name, and what must be said of them."""
    if filed in DATASETS:
        return f"--dataset {filed}", ""
    size = find_size(filed)
    options = f"--dataset KIND:PATH{f' --image-size {size[0]} {size[1]}' if size else ''}"
    return options, f"  # KIND:PATH: folder:, idx: or csv:, and where the data of {filed} lie"


def _departures(records: Sequence[Record]) -> list[str]:
    """The options that depart from the named recipe."""
    own: dict[str, Any] = next((record.config["recipe"] for record in records if record.config.get("recipe")), {})
    usual = vars(find_recipe(cast(RecipeName, records[0].recipe), cast(PresetName, records[0].preset)))
    options = {"epochs": "--epochs", "batch_size": "--batch-size", "learning_rate": "--learning-rate"}
    found = [f"{option} {own[name]}" for name, option in options.items() if own.get(name, usual[name]) != usual[name]]
    had_augmentation = own.get("augmentation", usual["augmentation"]) is not None
    return found if had_augmentation or usual["augmentation"] is None else [*found, "--no-augmentation"]
