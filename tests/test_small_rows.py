"""Small students as rows of the table, and on the command line."""

from pathlib import Path
from typing import Any

import pytest
from tiny import make_dataset, make_lab

from mnist_lab.compress.distill import Distil, DistillationConfig
from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.qat import Learning, Quantization, TrainQuantized
from mnist_lab.errors import UserError
from mnist_lab.experiments.make import make
from mnist_lab.experiments.row import Row, describe
from mnist_lab.experiments.rows import (
    FFN,
    MOE,
    deployed,
    small_from_scratch,
    small_student,
    static_int8,
    trained_quantized,
    weight_only,
)
from mnist_lab.experiments.run import Run
from mnist_lab.models.ffn import Windows
from mnist_lab.models.small import SmallOptions, SmallShape, parse_windows

SHAPE = SmallShape((16,), 2, (Windows(8, 3, 2),))
IN_2_BITS = TrainQuantized(Quantization(Rounding(2)), Learning(0))


@pytest.mark.parametrize(
    ("row", "name", "technique", "parent"),
    [
        (small_student(SHAPE), "KD_small-pool2-w8x3s2-h16", "kd", MOE.name),
        (small_student(SHAPE, FFN), "KD_small_from_FFN-pool2-w8x3s2-h16", "kd", FFN.name),
        (small_student(SHAPE, MOE, DistillationConfig(2)), "KD_small-pool2-w8x3s2-h16-T2", "kd", MOE.name),
        (small_from_scratch(SmallShape((8, 4))), "FFN_small-h8-h4", "dense", None),
        (static_int8(small_student(SHAPE)), "KD_small_INT8-pool2-w8x3s2-h16", "kd + static ptq", None),
        (
            deployed(trained_quantized(small_student(SHAPE), IN_2_BITS)),
            "KD_small_QAT-b2-ft0-pool2-w8x3s2-h16",
            "kd + qat",
            "KD_small_QAT_FP32-b2-ft0-pool2-w8x3s2-h16",
        ),
    ],
)
def test_names_tell_the_shape(row: Row, name: str, technique: str, parent: str | None) -> None:
    assert (row.name, row.technique) == (name, technique)
    if parent is not None:
        assert [of.name for of in row.parents.values()] == [parent]


def test_windows_are_not_measured_where_they_would_stay_in_float() -> None:
    assert static_int8(small_student(SHAPE)).runtimes == ("onnxruntime", "openvino")
    assert "torchao" in static_int8(small_student(SmallShape((16,), 2))).runtimes


def test_settings_hold_the_whole_shape() -> None:
    settings = describe(Distil(shape=SHAPE))
    assert settings is not None
    windows = ({"channels": 8, "size": 3, "stride": 2},)
    assert settings["shape"] == {"hidden": (16,), "pool": 2, "windows": windows}
    assert describe(Distil()) == {
        "kind": "Distil",
        "distillation": {"temperature": 3.0, "alpha": 0.7},
        "shape": "student",
    }


def test_a_small_student_is_made_and_deployed_like_any_other(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, dataset=make_dataset())
    scratch = small_from_scratch(SHAPE)
    learned = deployed(trained_quantized(scratch, IN_2_BITS))
    rows = [scratch, small_student(SHAPE, scratch), learned, weight_only(scratch)]
    for row in (scratch, learned.source, *rows[1:]):
        assert row is not None
        made = make(Run(lab, row, 0))
        assert made.params_total == 8 * 9 + 8 + 16 * 288 + 16 + 170
    in_float, in_2_bits = (Run(lab, row, 0).artifact.stat().st_size for row in (scratch, learned))
    assert in_2_bits < in_float / 6
    assert [Run(lab, row, 0).why_stale() for row in rows] == [None] * 4


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, None),
        ({"pool": 2}, SmallShape((), 2)),
        ({"hidden": (64, 32)}, SmallShape((64, 32))),
        ({"windows": ("8x5s2", "16x3s1")}, SmallShape((), 1, (Windows(8, 5, 2), Windows(16, 3, 1)))),
    ],
)
def test_options_make_a_shape(options: dict[str, Any], shape: SmallShape | None) -> None:
    assert SmallOptions(**options).shape == shape


@pytest.mark.parametrize("text", ["", "8x5", "8x5s", "x5s2", "8x5s2x", "-8x5s2", "8 x5s2", "1e3x5s2", "٣x5s2"])
def test_windows_are_three_numbers(text: str) -> None:
    with pytest.raises(UserError, match="channels, x, size, s and stride, as 8x5s2"):
        parse_windows(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": (0,)}, "--hidden 0 must lie between 1 and 10,000"),
        ({"pool": 0}, "--pool 0 must lie"),
        ({"windows": ("0x5s2",)}, "--windows 0x5s2: 0 must lie"),
        ({"hidden": (8,) * 17}, "--hidden has 17 layers"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SmallOptions(**options)
