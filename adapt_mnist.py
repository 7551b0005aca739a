"""Make a model of one data set one of another, by adapters of low rank beside its weights in 4 bits, and measure it.

python adapt_mnist.py                                # MNIST's MoE for Fashion-MNIST
python adapt_mnist.py --full                         # the yardstick: all of its parameters are trained
python adapt_mnist.py --rank 8 --init loftq          # adapters that start by undoing the rounding
python adapt_mnist.py --model ffn --dataset kmnist
python adapt_mnist.py --source Sparse_MoE-E8         # any row trained on --source-dataset, by its checkpoint's name
"""

from dataclasses import dataclass, field

from mnist_lab.command.console import make_and_print, open_lab
from mnist_lab.command.entry import DatasetText, run_script
from mnist_lab.command.source import ModelOptions, start
from mnist_lab.compress.adapters import Adapters, AdaptLowRank, FinetuneAll
from mnist_lab.compress.finetune import Duration
from mnist_lab.errors import UserError
from mnist_lab.experiments.pipeline import Chain, advance
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import adapted
from mnist_lab.sources import DatasetName


@dataclass(frozen=True)
class AdaptOptions(ModelOptions):
    dataset: DatasetText = "fashion-mnist"
    """Data set that the model is for in the end: one of the suite's, or own data (docs/own-data.md)."""
    source_dataset: DatasetName = "mnist"
    """Data set that it was trained on."""
    full: bool = False
    """Train all parameters in FP32, to compare with."""
    adapters: Adapters = field(default_factory=Adapters)
    duration: Duration = field(default_factory=Duration)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset == self.source_dataset:
            raise UserError(f"--dataset {self.dataset} is what the model was trained on: name another one")
        if self.full and self.adapters != Adapters():
            raise UserError("--full trains all parameters: drop --rank and --init")

    def row_from(self, source: Chain) -> Row:
        step = FinetuneAll(self.duration) if self.full else AdaptLowRank(self.adapters, self.duration)
        advance(source, step)
        return adapted(source.last, self.source_dataset, step)


def main(options: AdaptOptions) -> None:
    with open_lab(options) as lab:
        lab, _, row = start(lab, options, options.source_dataset)
        for record in make_and_print(lab, row, options.all_seeds):
            assert record.proof is not None
            print(record.proof["text"])


if __name__ == "__main__":
    run_script(main, AdaptOptions, __doc__)
