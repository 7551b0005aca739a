"""The grid of a sweep: its lists, its rows, and what cannot be."""

from dataclasses import fields

import pytest
import tyro
from tyro.conf import DisallowNone, OmitArgPrefixes

from mnist_lab.command.entry import REGISTRY
from mnist_lab.command.grid import OF_ALL, OF_MODEL, Grid
from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.errors import UserError
from mnist_lab.models.moe import RoutingConfig


def parse(text: str) -> Grid:
    return tyro.cli(Grid, args=text.split(), config=(OmitArgPrefixes, DisallowNone), registry=REGISTRY)


def names(text: str) -> list[str]:
    return [row.name for row in parse(text).find_rows().settings]


def test_every_setting_of_a_mixture_and_of_distillation_is_an_option() -> None:
    given = {setting.name for setting in fields(Grid)}
    assert {setting.name for config in (RoutingConfig, DistillationConfig) for setting in fields(config)} <= given
    assert given == {"model", "seeds", *OF_ALL, *(name for names in OF_MODEL.values() for name in names)}


def test_every_combination_is_a_row_once() -> None:
    assert names("") == ["Sparse_MoE"]
    assert names("--num-experts 2,4,4,8 --top-k 1,2") == [
        "Sparse_MoE-E2-K1", "Sparse_MoE-E2", "Sparse_MoE-K1", "Sparse_MoE", "Sparse_MoE-E8-K1", "Sparse_MoE-E8",
    ]  # fmt: skip
    assert names("--model ffn,moe --num-experts 4,8") == ["FFN_baseline", "Sparse_MoE", "Sparse_MoE-E8"]
    assert names("--noise yes,no --gate all --balance-weight 0.1") == [
        "Sparse_MoE-w0.1-all", "Sparse_MoE-w0.1-noiseFalse-all",
    ]  # fmt: skip


def test_students_vary_with_their_teachers_and_an_ffn_has_no_experts() -> None:
    text = "--model student --teacher ffn,moe --num-experts 4,8 --temperature 3,10 --alpha 0.5"
    assert names(text) == [
        "KD_FFN_Student_from_FFN-a0.5", "KD_FFN_Student_from_FFN-T10-a0.5", "KD_FFN_Student-a0.5",
        "KD_FFN_Student-T10-a0.5", "KD_FFN_Student-a0.5-E8", "KD_FFN_Student-T10-a0.5-E8",
    ]  # fmt: skip


def test_seeds_are_numbers_and_ranges() -> None:
    assert parse("--seeds 0-2,7,1-3").seeds == (0, 1, 2, 7, 3)


def test_combination_that_cannot_be_is_named_and_left_out() -> None:
    found = parse("--num-experts 2,4 --top-k 1,4").find_rows()
    assert [row.name for row in found.settings] == ["Sparse_MoE-E2-K1", "Sparse_MoE-K1", "Sparse_MoE-K4"]
    assert found.left_out == ["--top-k 4 must lie between 1 and --num-experts 2"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--num-experts 4 --top-k 1,8", "--top-k 8 is in no row: --top-k 8 must lie between 1 and --num-experts 4"),
        ("--num-experts 0,4", "--num-experts 0 is in no row"),
        ("--balance-weight nan", "--balance-weight nan"),
        ("--model student --temperature 3,-1", "--temperature -1.0"),
        ("--alpha 0.5", "--alpha is for --model student"),
        ("--model ffn --top-k 1", "--top-k is for --model moe or student"),
        ("--seeds 0-999 --num-experts 4,5,6,7,8,9,10,11,12,13,14", "the grid has 11,000 combinations"),
    ],
)
def test_what_is_in_no_row_is_the_users_mistake(text: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        (UserError, SystemExit)
    ) as error_info:  # the option parser shows an error of Grid's own in a box
        parse(text).find_rows()
    shown = f"{error_info.value} {capsys.readouterr().err}"
    assert says in " ".join(shown.replace("│", " ").split())


@pytest.mark.parametrize(
    "text", ["--seeds 3-1", "--seeds -1", "--seeds 0-99999999999", "--seeds 4294967296", "--seeds 0-1000",
             "--seeds a", "--num-experts 4,", "--num-experts 4.5", "--balance even", "--model moe,cnn",
             "--recipe slow", "--noise 1"],
)  # fmt: skip
def test_what_is_no_list_is_the_users_mistake(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(text)
    assert exit_info.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
