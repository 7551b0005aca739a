"""The rows of the curve: each of a name of its own, and as small as it is said to be."""

from pathlib import Path

import pytest
from tiny import make_lab, spec

from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.weight_only import Method, WeightOnly
from mnist_lab.errors import UserError
from mnist_lab.experiments.curve_rows import CURVE, DENSE, FAST, TINY, WINDOWS, in_four_bits
from mnist_lab.experiments.rows import MOE, STUDENTS, small_from_scratch
from mnist_lab.experiments.run import Run
from mnist_lab.models import build_model
from mnist_lab.models.small import SmallShape, parse_shape
from run_all_experiments import RunOptions

SIZES = (2.9, 4.1, 5.7, 8.3, 11.4, 22.9, 45.7, 2.9, 4.1, 8.3, 8.3, 9.5, 15.5)
KILOBYTES = dict(zip((*WINDOWS, *FAST, *DENSE), SIZES, strict=True))


def test_rows_have_names_of_their_own_and_parents_before_them() -> None:
    assert len({row.name for row in CURVE}) == len(CURVE)
    for place, row in enumerate(CURVE):
        assert not [parent for parent in row.parents.values() if parent in CURVE[place:]]
        assert row.teacher in {None, MOE}


@pytest.mark.parametrize(("shape", "kilobytes"), KILOBYTES.items(), ids=lambda value: getattr(value, "name", None))
def test_small_files_are_as_small_as_the_curve_needs_them(shape: SmallShape, kilobytes: float, tmp_path: Path) -> None:
    run = Run(make_lab(tmp_path), in_four_bits(small_from_scratch(shape)), seed=0)
    file, model = tmp_path / "small.onnx", build_model(shape.config(spec()))
    says = run.owner | {"config": run.settings, "parents": {"source": {"model": run.model, "sha256": "0123" * 16}}}
    WeightOnly(Rounding(4), Method("nearest")).write(model, file, run.work(), says)
    assert file.stat().st_size <= 1000 * kilobytes


@pytest.mark.parametrize("shape", [*WINDOWS, *FAST, *DENSE, *TINY, SmallShape((8, 4), 2, WINDOWS[0].windows)], ids=str)
def test_name_of_a_shape_says_all_of_it(shape: SmallShape) -> None:
    assert parse_shape(shape.name) == shape


@pytest.mark.parametrize("name", ["", "x8", "pool", "pool2-pool2", "h", "hx", "w8", "w8x5", "w8x5s2-"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError):
        parse_shape(name)


def test_suites_have_rows_of_their_own() -> None:
    for suite in (CURVE, STUDENTS):
        assert len({row.name for row in suite}) == len(suite)
    assert RunOptions(suite="curve").rows == CURVE
    assert RunOptions(suite="students").rows == STUDENTS
    assert RunOptions(suite="models").rows == RunOptions().rows
