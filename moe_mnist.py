"""Train the noisy top-K sparse mixture of experts, export it, and measure it.

python moe_mnist.py                                      # 4 experts, 2 per image: expect 99.19 ± 0.06 %
python moe_mnist.py --num-experts 8 --balance switch     # becomes Sparse_MoE-E8-switch
python moe_mnist.py --top-k 4                            # every expert: the dense MoE
python moe_mnist.py --top-k 1                            # one expert, weighed by its probability over all
python moe_mnist.py --expert-width 128                   # narrower experts: becomes Sparse_MoE-h128
"""

from dataclasses import dataclass, field

from mnist_lab.command.console import make_and_print, open_lab, print_expert_load, print_notice
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import RowOptions
from mnist_lab.compress.train import MixtureWidths
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import sparse_moe
from mnist_lab.models import PRESETS
from mnist_lab.models.moe import RoutingConfig


@dataclass(frozen=True)
class MoEOptions(RowOptions):
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    widths: MixtureWidths = field(default_factory=MixtureWidths)

    @property
    def row(self) -> Row:
        return sparse_moe(self.routing, self.widths.departing(PRESETS[self.preset]))


def main(options: MoEOptions) -> None:
    with open_lab(options) as lab:
        print_notice(options.routing.warning)
        for record in make_and_print(lab, options.row, options.all_seeds):
            print_expert_load(record)


if __name__ == "__main__":
    run_script(main, MoEOptions, __doc__)
