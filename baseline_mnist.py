"""Train the dense FFN baseline, export it, and measure it in PyTorch and ONNX Runtime.

python baseline_mnist.py                    # about a minute: expect 99.30 ± 0.08 %
python baseline_mnist.py --recipe quick     # about 98 % in seconds
"""

from mnist_lab.command.console import make_and_print, open_lab
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import Options
from mnist_lab.experiments.rows import FFN
from mnist_lab.experiments.run import Run


def main(options: Options) -> None:
    with open_lab(options) as lab:
        make_and_print(Run(lab, FFN, options.seed))


if __name__ == "__main__":
    run_script(main, Options, __doc__)
