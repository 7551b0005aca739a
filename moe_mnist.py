"""Train the noisy top-K sparse mixture of experts, export it, and measure it.

python moe_mnist.py                                      # 4 experts, 2 per image
python moe_mnist.py --num-experts 8 --balance switch     # becomes Sparse_MoE-E8-switch
python moe_mnist.py --top-k 4                            # every expert: the dense MoE
"""

from dataclasses import dataclass, field

from mnist_lab.console import make_and_print, open_lab, print_expert_load
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.options import Options
from mnist_lab.rows import sparse_moe
from mnist_lab.scripts import run_script


@dataclass(frozen=True)
class MoEOptions(Options):
    routing: RoutingConfig = field(default_factory=RoutingConfig)


def main(options: MoEOptions) -> None:
    with open_lab(options) as lab:
        row = sparse_moe(options.routing, suffix=options.suffix)
        print_expert_load(make_and_print(lab, row, options.seed))


if __name__ == "__main__":
    run_script(main, MoEOptions, __doc__)
