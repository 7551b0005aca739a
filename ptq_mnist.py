"""Convert a trained model to INT8 or fewer bits (post-training quantization), and measure it beside its FP32 form.

python ptq_mnist.py                                 # the FFN, static: expect 99.29 ± 0.08 %, 0.230 MiB
python ptq_mnist.py --model moe                     # the MoE, dynamic: expect 99.19 ± 0.07 %, 0.718 MiB
python ptq_mnist.py --model moe --mode static       # the contrast: expect 99.21 ± 0.07 %, 0.735 MiB
python ptq_mnist.py --target-cpu any                # weights of 7 bits, right also where 8 overflow (no VNNI)
python ptq_mnist.py --mode weight-only --bits 4     # weights of 4 bits, a scale for each output
python ptq_mnist.py --mode weight-only --model moe --size-budget 235    # of 2, 3, 4 or 8 bits, as fits into 235 KiB
python ptq_mnist.py --mode fused --model moe --bits 8   # for one image at a time: the experts as one operator
python ptq_mnist.py --source KD_FFN_Student-T10     # any trained row, by the name of its checkpoint
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from mnist_lab.command.console import make_and_print, open_lab, print_proof
from mnist_lab.command.entry import run_script
from mnist_lab.command.source import ModelOptions, start
from mnist_lab.compress.int8 import Calibration, DynamicInt8, Mode, StaticInt8
from mnist_lab.compress.levels import GroupSize, Rounding
from mnist_lab.compress.mixed_bits import Allocation, MixedBits
from mnist_lab.compress.qmoe import FusedExperts
from mnist_lab.compress.weight_only import Method, WeightOnly
from mnist_lab.errors import UserError
from mnist_lab.experiments.pipeline import Chain, advance
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import (
    SourceName,
    dynamic_int8,
    for_any_cpu,
    fused_experts,
    mixed_bits,
    static_int8,
    weight_only,
)
from mnist_lab.experiments.technique import Form

AnyMode = Mode | Literal["weight-only", "fused"]


@dataclass(frozen=True)
class PTQOptions(ModelOptions):
    usual: ClassVar[SourceName] = "ffn"

    model: SourceName | None = None
    """Trained model to convert (when neither this nor --source is given, ffn); student is KD_FFN_Student."""
    mode: AnyMode | None = None
    """static: INT8, activation ranges from calibration; dynamic: INT8, from each batch; weight-only: weights in --bits;
    fused: an MoE's experts in --bits 8 or 4 as one operator of ONNX Runtime, the fastest for one image at a time. When
    not given, static for dense models and dynamic for mixtures."""
    calibration: Calibration = field(default_factory=Calibration)
    target_cpu: Literal["this", "any"] = "this"
    """With --mode static or dynamic: on which CPUs the file must be right. Those like this one; or any, also x86
    without VNNI, where products of 8-bit weights overflow: they get 7 bits."""
    bits: Literal[8, 4, 3, 2] | None = None
    """Of a weight, with --mode weight-only (when not given, 4) or fused (8 or 4; when not given, 4)."""
    group_size: GroupSize = "channel"
    """With --mode weight-only: inputs of an output that share a scale, a power of two from 16 to 256; or channel, all
    of them, which is faster."""
    first_layer_bits: Literal[8, 4, 3, 2] | None = None
    """With --mode weight-only: of the first layer's weights; when not given, as many as of all others."""
    size_budget: float | None = None
    """In place of --bits: KiB that the whole file may take; how many bits each layer gets follows from that."""
    mean_bits: float | None = None
    """In place of --size-budget: the size of a file with so many bits a weight, 2 to 8 or any between."""
    allocation: Allocation = "sensitivity"
    """Which layers get more bits of such a budget: those where they keep the logits best for their bytes; or, as a
    yardstick, all get the same, and as many as fit, drawn by seed, one step more."""
    method: Method = field(default_factory=Method)

    def _check(self, source: Chain) -> None:
        """Raise UserError where options do not fit the mode, or the model."""
        mode = self.mode_for(source)
        if mode != "static" and self.calibration != Calibration():
            raise UserError(f"--calibration-size and --calibration-method are for --mode static, and this is {mode}")
        if self.target_cpu == "any" and mode not in {"static", "dynamic"}:
            raise UserError(f"--target-cpu any is for --mode static and dynamic, and this is {mode}")
        has_rounding = self.rounding != Rounding() or self.bits is not None
        if self.mixed is None:
            if self.allocation != "sensitivity":
                raise UserError(f"--allocation {self.allocation} shares out a --size-budget, and there is none")
        elif has_rounding:
            raise UserError(
                "--size-budget and --mean-bits choose the bits: drop --bits, --first-layer-bits and --group-size"
            )
        elif None not in {self.size_budget, self.mean_bits}:
            raise UserError("--size-budget and --mean-bits are two ways to say the same: drop one of them")
        if mode == "fused":
            self._check_fused(source)
        elif mode != "weight-only" and (has_rounding or (self.method, self.mixed) != (Method(), None)):
            raise UserError(
                f"{mode} mode stores 8 bits: drop --bits and whatever is for weight-only, or add --mode weight-only"
            )
        if self.method.router_bits is not None and source.num_experts == 1:
            raise UserError(f"--router-bits {self.method.router_bits}: {self.source_name} has no router")

    def _check_fused(self, source: Chain) -> None:
        if source.num_experts == 1:
            raise UserError(f"--mode fused makes one operator of all experts, and {self.source_name} has none")
        if self.rounding.bits not in {8, 4}:
            raise UserError(f"--bits {self.rounding.bits}: --mode fused takes 8 or 4")
        if (replace(self.rounding, bits=Rounding().bits), self.method, self.mixed) != (Rounding(), Method(), None):
            raise UserError("--mode fused has no options but --bits: drop whatever is for weight-only")

    @property
    def rounding(self) -> Rounding:
        return Rounding(self.bits or Rounding().bits, self.group_size, self.first_layer_bits)

    def mode_for(self, source: Chain) -> AnyMode:
        """The mode given, or the usual one."""
        return self.mode or ("static" if source.num_experts == 1 else "dynamic")

    @property
    def mixed(self) -> MixedBits | None:
        """The form of a budget, where there is one."""
        if self.size_budget is None and self.mean_bits is None:
            return None
        return MixedBits(
            self.size_budget,
            MixedBits().mean_bits if self.mean_bits is None else self.mean_bits,
            self.allocation,
            self.method,
        )

    def form_of(self, source: Chain) -> Form:
        match self.mode_for(source):
            case "fused":
                return FusedExperts(8 if self.rounding.bits == 8 else 4)
            case "weight-only":
                return self.mixed or WeightOnly(self.rounding, self.method)
            case "dynamic":
                return DynamicInt8()
            case "static":
                return StaticInt8(self.calibration)

    def row_from(self, source: Chain) -> Row:
        self._check(source)
        form = self.form_of(source)
        advance(source, form)
        match form:
            case FusedExperts():
                return fused_experts(source.last, form)
            case MixedBits():
                return mixed_bits(source.last, form)
            case WeightOnly():
                return weight_only(source.last, form)
        row = static_int8(source.last, form) if isinstance(form, StaticInt8) else dynamic_int8(source.last)
        return for_any_cpu(row) if self.target_cpu == "any" else row


def _check_calibration_size(size: int, num_images: int) -> None:
    """Raise UserError where more images are asked for than there are; the default takes what there is."""
    if size > num_images and size != Calibration().calibration_size:
        raise UserError(f"--calibration-size {size} is more than the {num_images:,} training images")


def main(options: PTQOptions) -> None:
    with open_lab(options) as lab:
        lab, source, row = start(lab, options)
        _check_calibration_size(options.calibration.calibration_size, len(lab.dataset.train))
        for record in make_and_print(lab, row, options.all_seeds, beside=source):
            print_proof(record)


if __name__ == "__main__":
    run_script(main, PTQOptions, __doc__)
