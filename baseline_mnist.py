"""Train the dense FFN baseline, export it, and measure it in PyTorch and ONNX Runtime.

python baseline_mnist.py                    # about 99.1 % test accuracy in about a minute
python baseline_mnist.py --recipe quick     # about 98 % in seconds
"""

from mnist_lab.console import make_and_print, open_lab
from mnist_lab.options import Options
from mnist_lab.rows import ffn_baseline
from mnist_lab.scripts import run_script


def main(options: Options) -> None:
    with open_lab(options) as lab:
        make_and_print(lab, ffn_baseline(suffix=options.suffix), options.seed)


if __name__ == "__main__":
    run_script(main, Options, __doc__)
