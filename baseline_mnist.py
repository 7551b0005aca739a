"""Train the dense FFN baseline, export it, and measure it in PyTorch and ONNX Runtime.

python baseline_mnist.py                    # about a minute: expect 99.30 ± 0.08 %
python baseline_mnist.py --recipe quick     # about 98 % in seconds
python baseline_mnist.py --hidden 512 256   # becomes FFN_baseline-h512-h256
"""

from dataclasses import dataclass

from mnist_lab.command.console import make_and_print, open_lab
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import RowOptions
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import FFN, dense
from mnist_lab.models import PRESETS


@dataclass(frozen=True)
class BaselineOptions(RowOptions):
    hidden: tuple[int, ...] = ()
    """Widths of the hidden layers, in place of the preset's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.row  # noqa: B018

    @property
    def row(self) -> Row:
        return FFN if self.hidden in {(), PRESETS[self.preset].ffn_widths} else dense(self.hidden)


def main(options: BaselineOptions) -> None:
    with open_lab(options) as lab:
        make_and_print(lab, options.row, options.all_seeds)


if __name__ == "__main__":
    run_script(main, BaselineOptions, __doc__)
