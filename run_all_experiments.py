"""Train or load all nine models, measure them side by side, and write the table and the plots.

python run_all_experiments.py                               # asks: train or load?
python run_all_experiments.py --mode load                   # uses what is there, trains the rest
python run_all_experiments.py --mode train --recipe quick   # everything anew in about a minute
python run_all_experiments.py --mode load --seeds 5         # means and 95 % intervals
"""

from dataclasses import dataclass
from typing import Literal

from mnist_lab.console import run_table
from mnist_lab.options import Options, check_count
from mnist_lab.scripts import run_script


@dataclass(frozen=True)
class RunOptions(Options):
    mode: Literal["train", "load"] | None = None
    """train makes every model anew; load uses up-to-date checkpoints and trains the rest; when not given, asks."""
    seeds: int = 1
    """Number of seeds, from --seed upward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--seeds", self.seeds)


def main(options: RunOptions) -> None:
    run_table(options, mode=options.mode, seeds=range(options.seed, options.seed + options.seeds))


if __name__ == "__main__":
    run_script(main, RunOptions, __doc__)
