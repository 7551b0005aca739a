"""Train the dense FFN baseline, export it, and measure it in PyTorch and ONNX Runtime.

python baseline_mnist.py                    # about 98.9 % test accuracy in under a minute
python baseline_mnist.py --recipe quick     # about 98 % in seconds
"""

from mnist_lab.console import make_and_print
from mnist_lab.options import Options
from mnist_lab.rows import ffn_baseline
from mnist_lab.scripts import run_script


def main(options: Options) -> None:
    make_and_print(options, ffn_baseline(suffix=options.suffix))


if __name__ == "__main__":
    run_script(main, Options, __doc__)
