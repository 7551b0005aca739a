import pytest

from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.compress.int8 import Calibration
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.experiments.rows import Row, place_in_table, quantized, sparse_moe, student, table_rows


def test_table_has_the_nine_models_and_the_bf16_ones_parents_first() -> None:
    rows = table_rows()
    assert {row.model for row in rows} == {
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
    }
    names = [row.model for row in rows]
    assert names[0] == "FFN_baseline"
    for row in rows:
        if row.parent is not None:
            assert names.index(row.parent) < names.index(row.model)
    assert table_rows(bfloat16=False) == rows[:9]


@pytest.mark.parametrize(
    ("row", "model", "technique", "parent"),
    [
        (sparse_moe(), "Sparse_MoE", "moe", None),
        (sparse_moe(RoutingConfig(8, 1, "switch", 0.1, 1.25)), "Sparse_MoE-E8-K1-switch-w0.1-c1.25", "moe", None),
        (student(distillation=DistillationConfig(10.0)), "KD_FFN_Student-T10", "kd", "Sparse_MoE"),
        (student("ffn", DistillationConfig(3.0, 0.5)), "KD_FFN_Student_from_FFN-a0.5", "kd", "FFN_baseline"),
        (student("ffn", None), "FFN_Student_no_KD", "dense", None),
        (student(distillation=DistillationConfig(3.0000001)), "KD_FFN_Student-T3.0000001", "kd", "Sparse_MoE"),
        (student(suffix="-epochs3"), "KD_FFN_Student-epochs3", "kd", "Sparse_MoE-epochs3"),
        (quantized("ffn"), "FFN_PTQ_INT8", "static ptq", "FFN_baseline"),
        (quantized("ffn", "dynamic"), "FFN_PTQ_INT8-dynamic", "dynamic ptq", "FFN_baseline"),
        (quantized("moe"), "Sparse_MoE_INT8", "moe + dynamic ptq", "Sparse_MoE"),
        (quantized("moe", "static", Calibration(50)), "Sparse_MoE_PTQ-cal50", "moe + static ptq", "Sparse_MoE"),
        (quantized("ffn", None, Calibration(1000, "entropy")), "FFN_PTQ_INT8-entropy", "static ptq", "FFN_baseline"),
        (quantized("student"), "KD_FFN_Student_INT8", "kd + static ptq", "KD_FFN_Student"),
    ],
)
def test_names_tell_what_departs_from_the_default(row: Row, model: str, technique: str, parent: str | None) -> None:
    assert (row.model, row.technique, row.parent) == (model, technique, parent)


def test_variants_stand_where_their_model_does() -> None:
    assert place_in_table("KD_FFN_Student-T10") == place_in_table("KD_FFN_Student") == 5
