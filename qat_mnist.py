"""Train a model with weights of few bits, export it as it learned, and measure it beside its FP32 form.

python qat_mnist.py --model moe --bits 2                    # the whole network learns its task with 2 bits
python qat_mnist.py --model moe --bits ternary --teacher self
python qat_mnist.py --bits 1 --start scratch
python qat_mnist.py --bits 8 --activation-bits 8            # INT8, as ptq_mnist.py makes it
python qat_mnist.py --model moe --bits 2 --learn layers     # each layer learns what its twin in FP32 gives
python qat_mnist.py --source Sparse_MoE_fewer_experts-self  # any trained row, by the name of its checkpoint
"""

from dataclasses import dataclass, field
from typing import ClassVar

from mnist_lab.command.console import make_and_print, open_lab, print_proof
from mnist_lab.command.entry import run_script
from mnist_lab.command.source import ModelOptions, start
from mnist_lab.compress.qat import Learning, Quantization, TrainQuantized
from mnist_lab.errors import UserError
from mnist_lab.experiments.pipeline import Chain, advance
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import SourceName, deployed, trained_quantized


@dataclass(frozen=True)
class QATOptions(ModelOptions):
    usual: ClassVar[SourceName] = "ffn"

    model: SourceName | None = None
    """Trained model to start from, or that is the teacher (when neither this nor --source is given, ffn); student is
    KD_FFN_Student."""
    quantization: Quantization = field(default_factory=Quantization)
    training: Learning = field(default_factory=Learning)

    def row_from(self, source: Chain) -> Row:
        step = TrainQuantized(self.quantization, self.training)
        if self.quantization.router_bits is not None and source.num_experts == 1:
            raise UserError(f"--router-bits {self.quantization.router_bits}: {self.source_name} has no router")
        advance(source, step)
        return deployed(trained_quantized(source.last, step))


def main(options: QATOptions) -> None:
    with open_lab(options) as lab:
        lab, source, row = start(lab, options)
        for record in make_and_print(lab, row, options.all_seeds, beside=source, with_source=True):
            print_proof(record)


if __name__ == "__main__":
    run_script(main, QATOptions, __doc__)
