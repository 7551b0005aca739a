"""Train a model with weights of few bits, export it as it learned, and measure it beside its FP32 form.

python qat_mnist.py --model moe --bits 2                    # the whole network learns its task with 2 bits
python qat_mnist.py --model moe --bits ternary --teacher self
python qat_mnist.py --bits 1 --start scratch
python qat_mnist.py --bits 8 --activation-bits 8            # INT8, as ptq_mnist.py makes it
python qat_mnist.py --model moe --bits 2 --learn layers     # each layer learns what its twin in FP32 gives
"""

from dataclasses import dataclass, field

from mnist_lab.command.console import make_and_print, open_lab, print_proof
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import Options
from mnist_lab.compress.qat import Learning, Quantization, TrainQuantized
from mnist_lab.errors import UserError
from mnist_lab.experiments.rows import SOURCES, SourceName, deployed, trained_quantized
from mnist_lab.experiments.run import Run


@dataclass(frozen=True)
class QATOptions(Options):
    model: SourceName = "ffn"
    """Trained model to start from, or that is the teacher; student is KD_FFN_Student."""
    quantization: Quantization = field(default_factory=Quantization)
    training: Learning = field(default_factory=Learning)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization.router_bits is not None and self.model != "moe":
            raise UserError(f"--router-bits {self.quantization.router_bits}: {self.model} has no router")
        self.step  # noqa: B018

    @property
    def step(self) -> TrainQuantized:
        return TrainQuantized(self.quantization, self.training)


def main(options: QATOptions) -> None:
    source = SOURCES[options.model]
    row = deployed(trained_quantized(source, options.step))
    with open_lab(options) as lab:
        run, beside = Run(lab, row, options.seed), Run(lab, source, options.seed)
        print_proof(make_and_print(run, beside=beside, with_source=True))


if __name__ == "__main__":
    run_script(main, QATOptions, __doc__)
