"""Train or load all models of the table, measure them side by side, and write the table and the plots.

python run_all_experiments.py                               # asks: train or load?
python run_all_experiments.py --mode load                   # uses what is there, trains the rest
python run_all_experiments.py --mode train --recipe quick   # everything anew in less than a minute
python run_all_experiments.py --mode load --suite compression   # pruned and merged models beside rivals of their size
python run_all_experiments.py --mode load --seeds 5         # means and 95 % intervals, a few minutes a seed

Over those five seeds expect FFN 99.30 ± 0.08 %, MoE 99.19 ± 0.06 %, student 98.85 ± 0.12 %
"""

from dataclasses import dataclass
from typing import Literal

from mnist_lab.command.console import Mode, run_table
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import Options, seeds_from
from mnist_lab.compress.bfloat16 import has_bfloat16
from mnist_lab.experiments.rows import COMPRESSION, MODELS, TABLE


@dataclass(frozen=True)
class RunOptions(Options):
    mode: Mode | None = None
    """train makes every model anew; load uses up-to-date checkpoints and trains the rest; when not given, asks."""
    suite: Literal["models", "compression"] = "models"
    """Which rows: the nine models, with BF16 where the CPU has it; or pruned models, their rivals, and fewer bits."""
    seeds: int = 1
    """Number of seeds, from --seed upward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        seeds_from(self.seed, self.seeds)


def main(options: RunOptions) -> None:
    models = TABLE if has_bfloat16() else MODELS
    rows = models if options.suite == "models" else COMPRESSION
    run_table(options, rows, mode=options.mode, seeds=seeds_from(options.seed, options.seeds))


if __name__ == "__main__":
    run_script(main, RunOptions, __doc__)
