"""What settles the claims about distilling a mixture and about techniques together, on made-up records."""

from pathlib import Path

import pytest
from test_claims_few_bits import Change, ancestors, make_evidence_of, points

from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import MOE
from mnist_lab.report.records import Record
from mnist_lab.studies.claims.distillation import (
    ALONE,
    COMBINED,
    EQUAL_BYTES,
    EQUAL_TIME,
    FROM_SCRATCH,
    IN_PART,
    LARGER,
    LOGITS_ALONE,
    MATCHED,
    SMALLER,
    TIMED_STUDENTS,
    UNTAUGHT,
    distillation_rows,
    settle_distillation,
)
from mnist_lab.studies.claims.findings import Finding, summarize


def timed(milliseconds: float) -> Change:
    def change(record: Record) -> None:
        record.measurements["onnxruntime"].latency_ms = {
            batch: {"median_ms": size * milliseconds, "q1_ms": 0, "q3_ms": 1, "num_calls": 9}
            for batch, size in (("1", 1), ("64", 30))
        }

    return change


HOLD: list[tuple[Row, Change]] = [
    *[(row, timed(0.01 * place)) for place, row in enumerate(TIMED_STUDENTS, start=1)],
    (MATCHED, points(1)),
    (COMBINED.row, points(1)),
    (SMALLER[16], points(-10)),
]
REFUTED: list[tuple[int, Row, Change]] = [
    (25, LOGITS_ALONE, points(2)),
    *[(26, row, points(2)) for row in (EQUAL_BYTES, EQUAL_TIME)],
    *[(27, alone.row, points(2)) for alone in ALONE],
    (28, SMALLER[16], points(10)),
]
REPORTED: list[tuple[Row, Change]] = [
    *[(row, points(1.5)) for row in (*IN_PART.values(), UNTAUGHT, FROM_SCRATCH)],
    *[(SMALLER[ratio], points(-3)) for ratio in (2, 4, 8)],
    (EQUAL_TIME, timed(0.5)),
    (LARGER, points(3)),
]


def settle(folder: Path, *changes: tuple[Row, Change]) -> list[Finding]:
    return settle_distillation(make_evidence_of(folder, distillation_rows(), [*HOLD, *changes]))


def test_rows_have_their_teachers_and_ancestors_first_and_no_name_twice() -> None:
    rows = distillation_rows()
    assert len({row.name for row in rows}) == len(rows)
    assert rows[0] == MOE
    assert all("onnxruntime" in row.runtimes for row in rows)  # where all are compared
    for row in rows:  # no second mixture is trained, and nothing is taught by another model
        assert {ancestor for ancestor in ancestors(row) if not ancestor.parents} <= {MOE}


def test_claims_are_supported_where_they_hold_whatever_is_only_reported(tmp_path: Path) -> None:
    findings = settle(tmp_path, *REPORTED)
    assert summarize(findings) == dict.fromkeys(range(25, 29), "supported")
    assert len({finding.comparison for finding in findings}) == len(findings)
    deciding = [finding.claim for finding in findings if finding.verdict != "reported"]
    assert deciding == sorted(claim for claim, _, _ in REFUTED)


@pytest.mark.parametrize(("claim", "row", "change"), REFUTED, ids=lambda value: getattr(value, "name", None))
def test_claim_is_refuted_by_each_of_its_comparisons(claim: int, row: Row, change: Change, tmp_path: Path) -> None:
    findings = settle(tmp_path, (row, change))
    assert [finding.claim for finding in findings if finding.verdict == "refuted"] == [claim]


def test_times_and_files_are_told_beside_the_dense_students(tmp_path: Path) -> None:
    effects = {finding.comparison: finding.effect for finding in settle(tmp_path)}
    assert effects["time, mixture / dense student, equal bytes, batch 64"] == pytest.approx(1 / 2)
    assert effects["time, mixture / dense student, no slower, batch 1"] == pytest.approx(1 / 3)
    assert effects["file, 1 bit / the original"] == pytest.approx(0.1)
