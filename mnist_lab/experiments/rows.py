"""The rows of the table, in its order."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, get_args

from mnist_lab.compress.adapters import AdaptLowRank, FinetuneAll
from mnist_lab.compress.bfloat16 import BFloat16
from mnist_lab.compress.distill import Distil, DistillationConfig
from mnist_lab.compress.distill_mixture import DistilMixture, Matching
from mnist_lab.compress.finetune import Finetuning
from mnist_lab.compress.int8 import DynamicInt8, StaticInt8
from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.merge_experts import MergeExperts
from mnist_lab.compress.mixed_bits import MixedBits
from mnist_lab.compress.prune_experts import ExpertPruning, PruneExperts
from mnist_lab.compress.prune_neurons import NeuronPruning, PruneNeurons
from mnist_lab.compress.prune_router import PruneRouter
from mnist_lab.compress.prune_weights import PruneWeights, WeightPruning
from mnist_lab.compress.qat import Learning, Quantization, TrainQuantized
from mnist_lab.compress.qmoe import FusedExperts
from mnist_lab.compress.refine import Refine
from mnist_lab.compress.share_base import ShareBase, Sharing
from mnist_lab.compress.synthetic import SYNTHETIC, DistilOnImages, Images
from mnist_lab.compress.train import MixtureWidths, TrainEarlyMoE, TrainFFN, TrainLike, TrainMoE, TrainWidthsOfMoE
from mnist_lab.compress.weight_only import AsTrained, Method, WeightOnly
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.technique import Form
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.models.small import SmallShape
from mnist_lab.report.records import BASELINE, CONTROL, MIXTURE, RIVAL
from mnist_lab.sources import DatasetName

FFN = Row(BASELINE, TrainFFN())
FEW_IMAGES = 1000  # for a student that learns on few
STUDENT_WITHOUT_TEACHER = Row(CONTROL, TrainFFN("student"))


def dense(widths: tuple[int, ...]) -> Row:
    """The dense FFN with hidden layers of other widths than the preset's."""
    return Row(BASELINE, TrainFFN(widths), variant=SmallShape(widths).name)


def sparse_moe(routing: RoutingConfig = RoutingConfig(), widths: MixtureWidths = MixtureWidths()) -> Row:
    """The noisy top-K mixture of experts."""
    step = TrainMoE(routing) if widths == MixtureWidths() else TrainWidthsOfMoE(routing, widths)
    return Row(MIXTURE, step)


MOE = sparse_moe()


def _taught_by(teacher: Row, family: str) -> str:
    return family if teacher.family == MOE.family else f"{family}_from_{'FFN' if teacher == FFN else teacher.family}"


def student(teacher: Row = MOE, distillation: DistillationConfig = DistillationConfig()) -> Row:
    """The small FFN, taught by the MoE or the baseline."""
    return Row(_taught_by(teacher, "KD_FFN_Student"), Distil(distillation), teacher=teacher)


STUDENT = student()


def student_mixture(teacher: Row = MOE, step: DistilMixture = DistilMixture()) -> Row:
    """The small mixture, taught by the MoE, or by the baseline's logits alone."""
    return Row(_taught_by(teacher, "KD_MoE_Student"), step, teacher=teacher)


def small_student(
    shape: SmallShape, teacher: Row = MOE, distillation: DistillationConfig = DistillationConfig()
) -> Row:
    """One of the small family, taught by the MoE or the baseline."""
    return Row(_taught_by(teacher, "KD_small"), Distil(distillation, shape), teacher=teacher, variant=shape.name)


def small_from_scratch(shape: SmallShape) -> Row:
    """The same without a teacher."""
    return Row("FFN_small", TrainFFN(shape), variant=shape.name)


def student_on_images(taught: Row = STUDENT, images: Images = "synthetic", *, num_images: int | None = None) -> Row:
    """A dense student on its teacher's classes alone, of images that are made, or of another data set's."""
    assert isinstance(taught.step, Distil)
    variant = "-".join(filter(None, [taught.variant, images]))
    return replace(taught, step=DistilOnImages(images, num_images, taught.step.shape), variant=variant)


EARLY_MOE = Row("Sparse_MoE_early", TrainEarlyMoE())
TeacherName = Literal["moe", "ffn", "ensemble", "wide-moe", "wide-ffn", "early-moe"]


def taught_by(teacher: TeacherName, taught: Callable[[Row], Row], ensemble_size: int = 3) -> Row:
    """What `taught` makes of the MoE or the baseline, taught by several seeds of it, its wide form, or an early one."""
    own = FFN if teacher in {"ffn", "wide-ffn"} else MOE
    row = taught(own)
    if teacher in {"moe", "ffn"}:
        return row
    name = f"ensemble{ensemble_size}" if teacher == "ensemble" else teacher.partition("-")[0]
    better = EARLY_MOE if teacher == "early-moe" else replace(own, preset="wide" if name == "wide" else None)
    return replace(
        row,
        teacher=better,
        teacher_seeds=ensemble_size if teacher == "ensemble" else 1,
        variant="-".join(filter(None, [row.variant, name])),
    )


SourceName = Literal["ffn", "moe", "student"]
SOURCES: dict[SourceName, Row] = {"ffn": FFN, "moe": MOE, "student": STUDENT}


def static_int8(source: Row, form: StaticInt8 = StaticInt8()) -> Row:
    """A trained row in INT8, calibrated on training images."""
    family = {FFN.family: "FFN_PTQ_INT8", MOE.family: "Sparse_MoE_PTQ"}.get(source.family, f"{source.family}_INT8")
    return Row(family, source=source, form=form)


def dynamic_int8(source: Row) -> Row:
    """A trained row in INT8 without calibration: for the MoE the usual form, for the others a variant of the static."""
    if source.family == MOE.family:
        return Row("Sparse_MoE_INT8", source=source, form=DynamicInt8())
    return Row(static_int8(source).family, source=source, form=DynamicInt8(), variant="dynamic")


def for_any_cpu(row: Row) -> Row:
    """A row in INT8 with 7-bit weights; the same row where that is what this CPU needs."""
    assert isinstance(row.form, StaticInt8 | DynamicInt8)
    if row.form.reduced_range:
        return row
    variant = "-".join(filter(None, [row.variant, "any-cpu"]))
    return replace(row, form=replace(row.form, reduced_range=True), variant=variant)


def weight_only(source: Row, form: WeightOnly = WeightOnly()) -> Row:
    """A trained row with weights of few bits."""
    return Row(f"{source.family}_weight_only", source=source, form=form)


def fused_experts(source: Row, form: FusedExperts = FusedExperts()) -> Row:
    """A mixture with its experts as one operator of few bits."""
    return Row(f"{source.family}_fused", source=source, form=form)


def mixed_bits(source: Row, form: MixedBits = MixedBits()) -> Row:
    """A trained row with weights of a few bits each, within a budget."""
    return Row(f"{source.family}_mixed_bits", source=source, form=form)


def trained_quantized(source: Row, step: TrainQuantized) -> Row:
    """A row whose weights learned in few bits, as FP32 holds them."""
    way = "QAT" if step.quantization.learn == "task" else "layer_wise"
    return Row(f"{source.family}_{way}_FP32", step, source=source)


def deployed(trained: Row) -> Row:
    """The same in the few bits that it learned with, or in INT8."""
    assert isinstance(trained.step, TrainQuantized)
    config, family = trained.step.quantization, trained.family.removesuffix("_FP32")
    form: Form = AsTrained(config.rounding, config.router_bits, config.activation_bits)
    if config.is_int8:
        form = DynamicInt8() if family.startswith(MOE.family) else StaticInt8()
    return Row(family, source=trained, form=form)


def bfloat16(source: Row) -> Row:
    """A trained row in BF16."""
    return Row({FFN.family: "FFN_BF16"}.get(source.family, f"{source.family}_BF16"), source=source, form=BFloat16())


def pruned_weights(source: Row, step: PruneWeights) -> Row:
    """A trained row with most of its weights at zero."""
    return Row(f"{source.family}_pruned", step, source=source)


def pruned_neurons(source: Row, step: PruneNeurons) -> Row:
    """A trained row with narrower hidden layers."""
    return Row(f"{source.family}_narrower", step, source=source)


def pruned_router(step: PruneRouter, source: Row = MOE) -> Row:
    """The mixture with most of its gate at zero."""
    return Row(f"{source.family}_sparse_router", step, source=source)


def merged_experts(step: MergeExperts, source: Row = MOE) -> Row:
    """The mixture with experts that became one."""
    return Row(f"{source.family}_merged", step, source=source)


def shared_base(step: ShareBase, source: Row = MOE) -> Row:
    """The mixture with experts of low rank around what they share."""
    return Row(f"{source.family}_shared_base", step, source=source)


def pruned_experts(step: PruneExperts, source: Row = MOE) -> Row:
    """The mixture with fewer experts."""
    return Row(f"{source.family}_fewer_experts", step, source=source)


def refined(source: Row, teacher: Row, step: Refine = Refine()) -> Row:
    """A row that learns on from another one, most often its original."""
    name = next((name for name, row in SOURCES.items() if row == teacher), teacher.name)
    variant = "" if teacher == original_of(source) else name
    return Row(f"{source.family}_refined", step, source=source, teacher=teacher, variant=variant)


def original_of(row: Row) -> Row:
    """The first of the chain of sources."""
    return row if row.source is None else original_of(row.source)


def adapted(source: Row, dataset: DatasetName, step: AdaptLowRank | FinetuneAll = AdaptLowRank()) -> Row:
    """A row trained on `dataset`, become one of the lab's own by adapters or by training all of it."""
    family = f"{source.family}_{'adapted' if isinstance(step, AdaptLowRank) else 'finetuned'}"
    return Row(family, step, source=replace(source, dataset=dataset), variant=dataset)


MODELS = (
    FFN,
    static_int8(FFN),
    MOE,
    dynamic_int8(MOE),
    static_int8(MOE),
    STUDENT,
    student(FFN),
    STUDENT_WITHOUT_TEACHER,
    static_int8(STUDENT),
)
BFLOAT16 = (bfloat16(FFN), bfloat16(MOE))  # for a CPU that has it
TABLE = (*MODELS, *BFLOAT16)


def rival(compressed: Row) -> Row:
    """A model of a compressed one's size, trained from scratch."""
    return Row(compressed.family + RIVAL, TrainLike(), teacher=compressed)


def _compression() -> Iterator[Row]:
    """What a trained model loses when something is left out of it, beside the same size from scratch, and in INT8; and
    what it loses in fewer bits.
    """
    by_itself, untrained = Finetuning(teacher="self"), Finetuning(finetune_epochs=0)
    yield from (FFN, MOE)
    for source, ratios in ((FFN, (0.8, 0.95)), (MOE, (0.5, 0.8, 0.9, 0.95, 0.98))):
        for ratio in ratios:
            yield from _beside_rival(pruned_weights(source, PruneWeights(WeightPruning(ratio), by_itself)))
    for ratio in (0.5, 0.9):
        yield pruned_router(PruneRouter(ratio, by_itself))
    for criterion in ("masks", "taylor"):
        yield pruned_neurons(MOE, PruneNeurons(NeuronPruning(0.5, criterion), by_itself))
    for source in (FFN, MOE):
        for ratio in (0.5, 0.75):
            yield from _beside_rival(pruned_neurons(source, PruneNeurons(NeuronPruning(ratio), by_itself)))
    for keep in (2, 1):
        yield from _beside_rival(pruned_experts(PruneExperts(ExpertPruning(keep), finetuning=by_itself)))
    for keep in (3, 2, 1):
        yield pruned_experts(PruneExperts(ExpertPruning(keep, "exact"), finetuning=untrained))
    yield merged_experts(MergeExperts(finetuning=by_itself))
    yield from _beside_rival(shared_base(ShareBase(Sharing(), by_itself)))
    yield from _few_bits()


def _few_bits() -> Iterator[Row]:
    """What a trained model loses in fewer bits: rounded, layer by layer, or trained with them."""
    yield from (static_int8(FFN), dynamic_int8(MOE), static_int8(MOE))
    yield from (fused_experts(MOE, FusedExperts(8)), fused_experts(MOE, FusedExperts(4)))
    affine = Method(scheme="affine")
    for source in (FFN, MOE):
        for rounding in (Rounding(8), Rounding(4), Rounding(3), Rounding(2)):
            yield weight_only(source, WeightOnly(rounding))
        for rounding in (Rounding(3), Rounding(2)):
            yield weight_only(source, WeightOnly(rounding, affine))
        for rounding in (Rounding(3), Rounding(2), Rounding("ternary")):
            yield learned(source, Quantization(rounding, learn="layers"))
        for rounding in (Rounding(4), Rounding(3), Rounding(2), Rounding("ternary"), Rounding(1)):
            yield learned(source, Quantization(rounding))
        yield learned(source, Quantization(Rounding(8), activation_bits=8))
    yield learned(MOE, Quantization(Rounding(1, first_layer_bits=2)))
    for method in (Method(router_bits=8), Method(router_bits=4), Method(router_bits=2)):
        yield weight_only(MOE, WeightOnly(Rounding(8), method))
    yield learned(MOE, Quantization(Rounding(8), router_bits=2))
    for method in (Method(activation_bits=8), Method(activation_bits=4)):
        yield weight_only(MOE, WeightOnly(Rounding(8), method))
    yield learned(MOE, Quantization(Rounding(8), activation_bits=4))
    for mean_bits in (2.5, 3):
        for method in (Method(), affine):
            yield from (mixed_bits(MOE, MixedBits(None, mean_bits, way, method)) for way in ("sensitivity", "even"))


def learned(source: Row, quantization: Quantization) -> Row:
    """As it is deployed, what learned in few bits from the trained model, which is its teacher too."""
    training = Learning(teacher="self" if quantization.learn == "task" else "none")
    return deployed(trained_quantized(source, TrainQuantized(quantization, training)))


def _beside_rival(compressed: Row) -> tuple[Row, Row, Row]:
    return compressed, static_int8(compressed), rival(compressed)


COMPRESSION = tuple(_compression())


def _students() -> Iterator[Row]:
    """Who may teach the small FFN, on what it may learn, and small mixtures; beside the control."""
    yield from (FFN, MOE, STUDENT_WITHOUT_TEACHER)
    yield from (taught_by(teacher, student) for teacher in get_args(TeacherName))
    kinds: tuple[Images, ...] = ("true", "synthetic", *SYNTHETIC, "noise")
    yield from (student_on_images(images=images) for images in kinds)
    yield student_on_images(images="true", num_images=FEW_IMAGES)
    for matching in (Matching(), Matching(0, 0)):
        yield student_mixture(step=DistilMixture(matching=matching))


STUDENTS = tuple(_students())


def families(rows: Iterable[Row]) -> tuple[str, ...]:
    """The table's order: each family stands where its first row does."""
    return tuple(dict.fromkeys(row.family for row in rows))


ORDER = families((*TABLE, *COMPRESSION, *STUDENTS))
