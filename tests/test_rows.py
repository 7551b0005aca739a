import pytest
from tiny import HALVED, SMALL, FourBits

from mnist_lab.compress.distill import Distil, DistillationConfig
from mnist_lab.compress.distill_mixture import DistilMixture, Matching, SmallMixture
from mnist_lab.compress.int8 import Calibration, DynamicInt8, StaticInt8
from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.mixed_bits import MixedBits
from mnist_lab.compress.qat import Learning, Quantization, TrainQuantized
from mnist_lab.compress.qmoe import FusedExperts
from mnist_lab.compress.weight_only import AsTrained, Method, WeightOnly
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import (
    BFLOAT16,
    COMPRESSION,
    FFN,
    MODELS,
    MOE,
    ORDER,
    STUDENT,
    STUDENT_WITHOUT_TEACHER,
    TABLE,
    bfloat16,
    deployed,
    dynamic_int8,
    families,
    fused_experts,
    mixed_bits,
    sparse_moe,
    static_int8,
    student,
    student_mixture,
    trained_quantized,
    weight_only,
)
from mnist_lab.experiments.technique import Form
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.studies.claims.rows import claim_rows, grid_rows


def test_table_has_its_models_parents_first_and_no_name_twice() -> None:
    promised = [
        "FFN_baseline",
        "FFN_PTQ_INT8",
        "Sparse_MoE",
        "Sparse_MoE_INT8",
        "Sparse_MoE_PTQ",
        "KD_FFN_Student",
        "KD_FFN_Student_from_FFN",
        "FFN_Student_no_KD",
        "KD_FFN_Student_INT8",
        "FFN_BF16",
        "Sparse_MoE_BF16",
    ]
    assert [row.name for row in TABLE if row.name in promised] == promised
    assert {row.form.precision for row in BFLOAT16} == {"BF16"}
    assert set(TABLE) == {*MODELS, *BFLOAT16}
    for rows in (TABLE, claim_rows(), grid_rows()):
        assert len({row.name for row in rows}) == len(rows)
        for place, row in enumerate(rows):
            assert all(parent in rows[:place] for parent in row.parents.values())
    assert families(TABLE)[0] == "FFN_baseline"


EXTREME = RoutingConfig(8, 1, "switch", 0.1, 1.25)
EVERY_FIELD = TrainQuantized(Quantization(Rounding(2, 64), 4, 8), Learning(3, "self"))
EVERY_TAG = "b2-g64-router4-a8-ft3-self"
LOGITS_ALONE = DistilMixture(DistillationConfig(5.0), matching=Matching(0, 0))
FROM_SCRATCH = Quantization(Rounding(1), start="scratch")
BY_LAYERS = Quantization(Rounding("ternary"), learn="layers")


@pytest.mark.parametrize(
    ("row", "name", "technique", "parent"),
    [
        (sparse_moe(), "Sparse_MoE", "moe", None),
        (sparse_moe(EXTREME), "Sparse_MoE-E8-K1-switch-w0.1-c1.25", "moe", None),
        (sparse_moe(RoutingConfig(noise=False)), "Sparse_MoE-noiseFalse", "moe", None),
        (student(MOE, DistillationConfig(10.0)), "KD_FFN_Student-T10", "kd", "Sparse_MoE"),
        (student(FFN, DistillationConfig(3.0, 0.5)), "KD_FFN_Student_from_FFN-a0.5", "kd", "FFN_baseline"),
        (student_mixture(), "KD_MoE_Student", "kd", "Sparse_MoE"),
        (
            student_mixture(sparse_moe(EXTREME), DistilMixture(student=SmallMixture(2, 128))),
            "KD_MoE_Student-E2-w128-E8-K1-switch-w0.1-c1.25",
            "kd",
            None,
        ),
        (student_mixture(FFN, LOGITS_ALONE), "KD_MoE_Student_from_FFN-T5-r0-x0", "kd", "FFN_baseline"),
        (dynamic_int8(student_mixture()), "KD_MoE_Student_INT8-dynamic", "kd + dynamic ptq", "KD_MoE_Student"),
        (STUDENT_WITHOUT_TEACHER, "FFN_Student_no_KD", "dense", None),
        (student(MOE, DistillationConfig(3.0000001)), "KD_FFN_Student-T3.0000001", "kd", "Sparse_MoE"),
        (static_int8(FFN), "FFN_PTQ_INT8", "static ptq", "FFN_baseline"),
        (dynamic_int8(FFN), "FFN_PTQ_INT8-dynamic", "dynamic ptq", "FFN_baseline"),
        (dynamic_int8(MOE), "Sparse_MoE_INT8", "moe + dynamic ptq", "Sparse_MoE"),
        (static_int8(MOE, StaticInt8(Calibration(50))), "Sparse_MoE_PTQ-cal50", "moe + static ptq", "Sparse_MoE"),
        (static_int8(FFN, StaticInt8(Calibration(1000, "entropy"))), "FFN_PTQ_INT8-entropy", "static ptq", FFN.name),
        (static_int8(STUDENT), "KD_FFN_Student_INT8", "kd + static ptq", "KD_FFN_Student"),
        (bfloat16(MOE), "Sparse_MoE_BF16", "moe", "Sparse_MoE"),
        (
            mixed_bits(FFN, MixedBits(99.5, allocation="even")),
            "FFN_baseline_mixed_bits-KiB99.5-even",
            "mixed-bit ptq",
            None,
        ),
        (mixed_bits(MOE, MixedBits(mean_bits=3)), "Sparse_MoE_mixed_bits-mean3", "moe + mixed-bit ptq", MOE.name),
        (dynamic_int8(sparse_moe(EXTREME)), "Sparse_MoE_INT8-E8-K1-switch-w0.1-c1.25", "moe + dynamic ptq", None),
        (fused_experts(MOE), "Sparse_MoE_fused", "moe + fused ptq", "Sparse_MoE"),
        (
            fused_experts(sparse_moe(EXTREME), FusedExperts(8)),
            "Sparse_MoE_fused-b8-E8-K1-switch-w0.1-c1.25",
            "moe + fused ptq",
            None,
        ),
        (weight_only(FFN), "FFN_baseline_weight_only", "weight-only ptq", "FFN_baseline"),
        (
            weight_only(MOE, WeightOnly(Rounding(2, 64), Method("nearest", "affine", 4, 8))),
            "Sparse_MoE_weight_only-b2-g64-nearest-affine-router4-a8",
            "moe + weight-only ptq",
            "Sparse_MoE",
        ),
        (trained_quantized(FFN, TrainQuantized()), "FFN_baseline_QAT_FP32", "qat", "FFN_baseline"),
        (trained_quantized(MOE, EVERY_FIELD), f"Sparse_MoE_QAT_FP32-{EVERY_TAG}", "moe + qat", "Sparse_MoE"),
        (deployed(trained_quantized(MOE, EVERY_FIELD)), f"Sparse_MoE_QAT-{EVERY_TAG}", "moe + qat", None),
        (
            deployed(trained_quantized(STUDENT, TrainQuantized(FROM_SCRATCH))),
            "KD_FFN_Student_QAT-b1-scratch",
            "kd + qat",
            "KD_FFN_Student_QAT_FP32-b1-scratch",
        ),
        (
            deployed(trained_quantized(MOE, TrainQuantized(BY_LAYERS))),
            "Sparse_MoE_layer_wise-bternary",
            "moe + layer-wise ptq",
            "Sparse_MoE_layer_wise_FP32-bternary",
        ),
        (Row("Further", form=FourBits(), source=HALVED), "Further", "zeroed + 4 bits", "Halved"),
    ],
)
def test_names_tell_what_departs_from_the_default(row: Row, name: str, technique: str, parent: str | None) -> None:
    assert (row.name, row.technique) == (name, technique)
    if parent is not None:
        assert [of.name for of in row.parents.values()] == [parent]


def test_what_learned_in_few_bits_is_deployed_in_those() -> None:
    def form_of(source: Row, quantization: Quantization) -> Form:
        return deployed(trained_quantized(source, TrainQuantized(quantization))).form

    assert form_of(MOE, Quantization(Rounding(2, 64), 4, 8)) == AsTrained(Rounding(2, 64), 4, 8)
    assert form_of(FFN, Quantization(Rounding(8))) == AsTrained(Rounding(8))
    assert form_of(FFN, Quantization(Rounding(8), activation_bits=8)) == StaticInt8()
    assert form_of(MOE, Quantization(Rounding(8), activation_bits=8)) == DynamicInt8()
    for kept in (Quantization(Rounding(8, 32), activation_bits=8), Quantization(Rounding(8), 2, 8)):
        assert isinstance(form_of(MOE, kept), AsTrained)  # INT8 knows no groups, and no rounded router


def test_variants_stand_where_their_family_does() -> None:
    assert student(MOE, DistillationConfig(10.0)).family == STUDENT.family
    assert dynamic_int8(FFN).family == static_int8(FFN).family


def test_row_is_exactly_one_of_a_step_and_another_form() -> None:
    for fields in (
        {"step": Distil(), "form": FourBits(), "source": SMALL},
        {"source": SMALL},
        {"form": FourBits()},
        {"form": FourBits(), "source": static_int8(FFN)},  # which keeps no weights that one could start from
    ):
        with pytest.raises(AssertionError):
            Row("Wrong", **fields)


def test_compression_has_a_rival_of_its_size_for_whatever_becomes_smaller() -> None:
    names = [row.name for row in COMPRESSION]
    assert len(set(names)) == len(names)
    assert {row.family for row in COMPRESSION} <= set(ORDER)
    rivals = {row.teacher.name for row in COMPRESSION if row.family.endswith("_rival") and row.teacher is not None}
    kinds = ("pruned", "narrower", "fewer", "shared")
    smaller = {n for n in names if any(kind in n for kind in kinds) and "rival" not in n and "INT8" not in n}
    assert rivals == {n for n in smaller if not set(n.split("-")) & {"masks", "taylor", "exact"}}
    in_int8 = {row.source.name for row in COMPRESSION if row.form == StaticInt8() and row.source is not None}
    assert in_int8 & smaller == rivals
