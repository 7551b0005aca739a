"""Convert a trained model to INT8 (post-training quantization), and measure it beside its FP32 form.

python ptq_mnist.py                                 # the FFN, static: calibrated on training images
python ptq_mnist.py --model moe                     # the MoE, dynamic: ranges taken from each batch
python ptq_mnist.py --model moe --mode static       # the contrast
"""

from dataclasses import dataclass, field

from mnist_lab.compress.quantize import Calibration, Mode
from mnist_lab.console import make_and_print, open_lab, print_proof
from mnist_lab.errors import UserError
from mnist_lab.options import Options
from mnist_lab.rows import ModelName, quantized, trained
from mnist_lab.scripts import run_script


@dataclass(frozen=True)
class PTQOptions(Options):
    model: ModelName = "ffn"
    """Trained model to convert; student is KD_FFN_Student."""
    mode: Mode | None = None
    """Where activation ranges come from: static (calibration) or dynamic (each batch); when not given, static
    for the dense models and dynamic for the MoE."""
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        super().__post_init__()
        if quantized(self.model, self.mode).mode == "dynamic" and self.calibration != Calibration():
            raise UserError("dynamic mode calibrates nothing: drop --calibration-size and --calibration-method")


def main(options: PTQOptions) -> None:
    row = quantized(options.model, options.mode, options.calibration, suffix=options.suffix)
    with open_lab(options) as lab:
        parent = trained(options.model, suffix=options.suffix)
        print_proof(make_and_print(lab, row, options.seed, beside=parent))


if __name__ == "__main__":
    run_script(main, PTQOptions, __doc__)
