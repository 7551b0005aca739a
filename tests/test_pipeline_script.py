"""`run_all_experiments.py --pipeline`, as the command line runs it."""

import pandas as pd
import pytest
from test_scripts import Bench, bench  # noqa: F401  a fixture

pytestmark = pytest.mark.slow
LOAD = ("run_all_experiments", "--mode", "load")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pipeline", "neurons 1.5"], 'error: link 1, "neurons 1.5": --ratio 1.5 must lie between 0 and 1'),
        (["--pipeline", "qat 4", "--pipeline", "ffn > experts 2"], 'error: link 2, "experts 2": it takes a mixture'),
        (["--pipeline", ""], 'error: --pipeline "" has no link; there are weights, neurons'),
        (["--pipeline", "qat 4", "--suite", "models"], "--suite models and --pipeline"),
    ],
)
def test_a_wrong_pipeline_is_the_users_mistake(bench: Bench, arguments: list[str], says: str) -> None:  # noqa: F811
    bench.expect_user_error(*LOAD, *arguments, says=says)


def test_rows_of_pipelines_stand_in_the_table_and_are_made_once(bench: Bench) -> None:  # noqa: F811
    pipelines = ["--pipeline", "ffn > neurons 0.5 > qat 2", "--pipeline", "ffn > neurons 0.5 > int8"]
    outcome = bench(*LOAD, *pipelines)
    assert outcome.code == 0, outcome.err
    table = pd.read_csv(bench.results / "table.csv")
    rows = ["FFN_baseline", "Sparse_MoE", *(f"FFN_baseline_narrower{end}" for end in ("", "_QAT_FP32-b2", "_QAT-b2"))]
    assert [*table["model"].unique()] == [f"{row}-epochs1" for row in (*rows, "FFN_baseline_narrower_INT8")]
    assert "FFN_baseline_narrower_QAT-b2-epochs1" in (bench.results / "curve.md").read_text()
    assert f"curve: results/{bench.results.name}/curve.md" in outcome.out
    before = {path: path.stat().st_mtime_ns for path in bench.checkpoints.iterdir()}
    again = bench(*LOAD, *pipelines)
    assert again.code == 0, again.err
    assert again.out.count("-seed0: found") == 6
    assert {path: path.stat().st_mtime_ns for path in bench.checkpoints.iterdir()} == before
