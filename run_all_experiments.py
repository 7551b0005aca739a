"""Train or load all models of the table, measure them side by side, and write the table and the plots.

python run_all_experiments.py                               # asks: train or load?
python run_all_experiments.py --mode load                   # uses what is there, trains the rest
python run_all_experiments.py --mode train --recipe quick   # everything anew in less than a minute
python run_all_experiments.py --mode load --suite compression   # pruned and merged models beside rivals of their size
python run_all_experiments.py --mode load --suite curve     # how small, at what accuracy: less than an hour a seed
python run_all_experiments.py --mode load --pipeline "experts keep=2 > neurons 0.5 > distil self > qat 4"
python run_all_experiments.py --mode load --seeds 5         # means and 95 % intervals, a few minutes a seed

Over those five seeds expect FFN 99.30 ± 0.08 %, MoE 99.19 ± 0.06 %, student 98.85 ± 0.12 %
"""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import UseAppendAction

from mnist_lab.command.console import Mode, run_table
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import RowOptions
from mnist_lab.compress.bfloat16 import has_bfloat16
from mnist_lab.errors import UserError
from mnist_lab.experiments.curve_rows import CURVE
from mnist_lab.experiments.pipeline import parse_pipelines
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import COMPRESSION, MODELS, STUDENTS, TABLE

SUITES: dict[str, tuple[Row, ...]] = {"compression": COMPRESSION, "students": STUDENTS, "curve": CURVE}


@dataclass(frozen=True)
class RunOptions(RowOptions):
    mode: Mode | None = None
    """train makes every model anew; load uses up-to-date checkpoints and trains the rest; when not given, asks."""
    suite: Literal["models", "compression", "students", "curve"] | None = None
    """Which rows: the nine models, with BF16 where the CPU has it; pruned models, their rivals, and fewer bits; other
    teachers, other images for students, and small mixtures; or the curve of accuracy against bytes, down to 1,000
    times smaller. When neither this nor --pipeline is given, models."""
    pipeline: UseAppendAction[tuple[str, ...]] = ()
    """In place of a suite, a chain of rows, "link > link > ..." (docs/pipelines.md); may be given again, to compare."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pipeline and self.suite is not None:
            raise UserError(f"--suite {self.suite} and --pipeline each say which rows to run: drop one of them")

    @property
    def rows(self) -> tuple[Row, ...]:
        if self.pipeline:
            return parse_pipelines(self.pipeline)
        usual = TABLE if has_bfloat16() else MODELS
        return usual if self.suite is None else SUITES.get(self.suite, usual)


def main(options: RunOptions) -> None:
    run_table(options, options.rows, mode=options.mode, seeds=options.all_seeds)


if __name__ == "__main__":
    run_script(main, RunOptions, __doc__)
