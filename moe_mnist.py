"""Train the noisy top-K sparse mixture of experts, export it, and measure it.

python moe_mnist.py                                      # 4 experts, 2 per image: expect 99.19 ± 0.06 %
python moe_mnist.py --num-experts 8 --balance switch     # becomes Sparse_MoE-E8-switch
python moe_mnist.py --top-k 4                            # every expert: the dense MoE
python moe_mnist.py --top-k 1                            # one expert, weighed by its probability over all
"""

from dataclasses import dataclass, field

from mnist_lab.command.console import make_and_print, open_lab, print_expert_load, print_notice
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import Options
from mnist_lab.experiments.rows import sparse_moe
from mnist_lab.experiments.run import Run
from mnist_lab.models.moe import RoutingConfig


@dataclass(frozen=True)
class MoEOptions(Options):
    routing: RoutingConfig = field(default_factory=RoutingConfig)


def main(options: MoEOptions) -> None:
    with open_lab(options) as lab:
        print_notice(options.routing.warning)
        print_expert_load(make_and_print(Run(lab, sparse_moe(options.routing), options.seed)))


if __name__ == "__main__":
    run_script(main, MoEOptions, __doc__)
