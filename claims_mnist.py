"""Train what the usual claims need over several seeds, test every claim, and write the verdicts.

python claims_mnist.py --recipe quick       # minutes
python claims_mnist.py                      # the standard recipe, within an hour: expect 6 of 14 supported
python claims_mnist.py --suite compression  # claims 15 to 19, about pruning a mixture, in claims_compression.md
python claims_mnist.py --suite few-bits     # claims 20 to 23, about fewer bits, in claims_few_bits.md
python claims_mnist.py --suite distillation # claims 25 to 28, about small mixtures and techniques together
python claims_mnist.py --suite transfer --dataset fashion-mnist  # claim 24, of MNIST's models, in claims_transfer.md
"""

from dataclasses import dataclass, replace
from functools import partial

from mnist_lab.command.console import FindLab, open_lab
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import Options, seeds_from
from mnist_lab.errors import UserError
from mnist_lab.studies.claims.draw import SuiteName
from mnist_lab.studies.claims.run import Doors, run_claims, run_suite, run_transfer
from mnist_lab.studies.claims.transfer import source_for


@dataclass(frozen=True)
class ClaimOptions(Options):
    suite: SuiteName = "models"
    """Which claims: the usual ones about the table's models, those about pruning a mixture, about fewer bits, about
    distilling it and techniques together, or about a model that becomes one of --dataset: MNIST's, or for MNIST
    Fashion-MNIST's."""
    seeds: int = 5
    """Number of seeds, from --seed upward; the grid of temperature and alpha takes up to three, on quick."""
    cluster: str | None = None
    """Address of a Dask scheduler (tcp://host:8786), whose workers make what is missing (docs/sweeps.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        seeds_from(self.seed, self.seeds)
        if not {"onnxruntime", "best"} & set(self.runtime):
            raise UserError(f"--runtime {' '.join(self.runtime)}: claims are about ONNX Runtime; add onnxruntime")


def main(options: ClaimOptions) -> None:
    seeds = seeds_from(options.seed, options.seeds)
    table = doors(options)
    if options.suite == "models":
        run_claims(table, doors(replace(options, recipe="quick")), seeds=seeds)
    elif options.suite == "transfer":
        source = replace(options, dataset=source_for(options.dataset or "mnist"), image_size=())
        run_transfer(table, doors(source), seeds=seeds)
    else:
        run_suite(options.suite, table, seeds=seeds)


def doors(options: ClaimOptions) -> Doors:
    return Doors(partial(open_lab, options), FindLab(options), options.cluster)


if __name__ == "__main__":
    run_script(main, ClaimOptions, __doc__)
