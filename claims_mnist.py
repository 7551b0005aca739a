"""Train what the usual claims need over several seeds, test every claim, and write the verdicts.

python claims_mnist.py --recipe quick       # minutes
python claims_mnist.py                      # the standard recipe: within an hour; finished seeds are not run again
"""

from dataclasses import dataclass, replace

from mnist_lab.claims.run import run_claims
from mnist_lab.options import Options, check_count
from mnist_lab.scripts import run_script


@dataclass(frozen=True)
class ClaimOptions(Options):
    seeds: int = 5
    """Number of seeds, from --seed upward; the grid of temperature and alpha takes up to three, on quick."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--seeds", self.seeds)


def main(options: ClaimOptions) -> None:
    seeds = range(options.seed, options.seed + options.seeds)
    run_claims(options, grid_options=replace(options, recipe="quick"), seeds=seeds)


if __name__ == "__main__":
    run_script(main, ClaimOptions, __doc__)
