"""Quantize a classifier of your own, an ONNX file, and measure it beside the suite's models.

python compare_onnx.py cnn.onnx                                    # on MNIST, beside what results/ holds of it
python compare_onnx.py cnn.onnx --mean 0.1307 --std 0.3081         # which gets normalised pixels
python compare_onnx.py net.onnx --dataset fashion-mnist --layout nhwc --scale 255 --beside all
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from tyro.conf import Positional

from mnist_lab.command.console import print_notice, print_table, use_allowed_cpus
from mnist_lab.command.entry import Folder, run_script
from mnist_lab.command.options import DataOptions, check_count
from mnist_lab.compress.foreign import Unquantized
from mnist_lab.data import load_dataset
from mnist_lab.deploy.foreign import ForeignModel, read_foreign
from mnist_lab.deploy.image_input import Preparation
from mnist_lab.errors import UserError
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.rows import ORDER
from mnist_lab.folders import only_run_in
from mnist_lab.machine import usable_cpus
from mnist_lab.models import PresetName
from mnist_lab.report.records import Record
from mnist_lab.report.table import build_table
from mnist_lab.report.text import write_table
from mnist_lab.studies.compare import doubt, measure_forms, suite_records, time_all, write_original
from mnist_lab.training import RecipeName, find_recipe

FEW = ("FFN_baseline", "FFN_PTQ_INT8", "Sparse_MoE", "Sparse_MoE_INT8", "KD_FFN_Student_INT8")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(DataOptions):
    file: Positional[Folder]
    """The ONNX file: one tensor of images in, scores by class out."""
    output: str | None = None
    """Name of the output that holds the scores; when not given, the first."""
    preparation: Preparation = field(default_factory=Preparation)
    beside: Literal["few", "all", "none"] = "few"
    """Rows of the suite beside it, of those that the results folder of this data set, preset and recipe holds: five of
    the usual table, all, or none."""
    preset: PresetName = "compact"
    """Set of architectures of the suite's rows."""
    recipe: RecipeName = "standard"
    """Training budget of the suite's rows."""
    threads: int = 1
    """CPU threads for measuring latency."""
    seed: int = 0
    """Seed that draws the training images which static INT8 is calibrated on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--threads", self.threads)
        if self.threads > usable_cpus():
            raise UserError(f"--threads {self.threads} is more than the {usable_cpus()} CPUs that this process may use")

    @property
    def rows(self) -> tuple[str, ...] | None:
        return {"few": FEW, "all": None, "none": ()}[self.beside]


def main(options: CompareOptions) -> None:
    use_allowed_cpus()
    dataset = load_dataset(options.dataset, options.data_dir, options.height_and_width)
    spec = dataset.spec
    foreign = read_foreign(
        options.file,
        options.preparation,
        image_size=spec.image_size,
        num_classes=spec.num_classes,
        output=options.output,
    )
    folder = f"{dataset.name}-{options.preset}-{options.recipe}"
    suite_lab = Lab(
        dataset=dataset,
        preset_name=options.preset,
        recipe_name=options.recipe,
        recipe=find_recipe(options.recipe, options.preset),
        checkpoints=options.checkpoints / folder,
        results=options.results / folder,
        threads=options.threads,
    )
    suite, left_out = suite_records(suite_lab, options.rows)
    own_folder = f"{dataset.name}-onnx-{foreign.name}"
    lab = replace(suite_lab, checkpoints=options.checkpoints / own_folder, results=options.results / own_folder)
    with only_run_in(lab.checkpoints, wait=options.wait), only_run_in(lab.results, wait=options.wait):
        print_notice(dataset.notice)
        for line in left_out:
            print(f"not beside it: {line}")
        if not suite and options.beside != "none":
            print(f"nothing stands beside it: {suite_lab.results} has no such rows; run_all_experiments.py makes them")
        compare(foreign, lab, suite_lab, suite, seed=options.seed)
        print_notice(dataset.notice)


def compare(foreign: ForeignModel, lab: Lab, suite_lab: Lab, suite: Sequence[Record], *, seed: int) -> None:
    """Make, measure and table a model's forms beside rows of the suite."""
    notes = list(foreign.notes)
    for note in notes:
        print(f"{foreign.name}.onnx: {note}", flush=True)
    original = write_original(foreign, lab)
    print(f"{original.name}: its scores are {original.scores}; validation accuracy {original.validation_acc:.2%}")
    print_notice(doubtful := doubt(original))
    records = []
    for form in measure_forms(original, seed=seed):
        if isinstance(form, Unquantized):
            notes.append(f"no {form.tag}: {form.reason}")
        else:
            records.append(form[0])
            notes.append(f"{form[0].model}: {form[1]}")
        print(notes[-1], flush=True)
    time_all(original, records, suite_lab, suite)
    write_comparison(lab, original.name, [*records, *suite], notes=[*notes, *([doubtful] if doubtful else [])])
    print_notice(doubtful)


def write_comparison(lab: Lab, name: str, records: Sequence[Record], *, notes: Sequence[str]) -> None:
    """Table and figures; the user's rows first."""
    order = (name, *ORDER)
    table = build_table(records, order=order)
    sections = {f"What was done with {name}": "\n".join(f"- {note}" for note in notes)}
    write_table(lab.results, table, title=f"{name} on {lab.dataset.name}", distillation="", sections=sections)
    print_table(table)
    print(f"\nfiles: {lab.checkpoints}\ntable: {lab.results / 'table.csv'} and table.md", flush=True)
    # Imported when the table is safe, as matplotlib may be broken.
    from mnist_lab.report.drawing import write_figures
    from mnist_lab.report.figures import accuracy_vs_size, accuracy_vs_time
    from mnist_lab.report.results import Results

    results = Results(records, order)
    figures = {draw.__name__: partial(draw, results) for draw in (accuracy_vs_size, accuracy_vs_time)}
    for path in write_figures(lab.results, figures):
        print(f"plot: {path}", flush=True)


if __name__ == "__main__":
    run_script(main, CompareOptions, __doc__)
