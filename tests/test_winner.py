"""What to deploy, from tiny records."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_measurement, make_record

from mnist_lab.machine import Machine
from mnist_lab.report.records import Record, Timing
from mnist_lab.report.winner import Winners, find_winners, format_winners, write_up_winners

FOLDER = Path("checkpoints/x")


def timing(median_ms: float, q3_ms: float | None = None) -> Timing:
    return {"median_ms": median_ms, "q1_ms": median_ms, "q3_ms": q3_ms or median_ms, "num_calls": 9}


def row(
    model: str,
    *validation: float,
    test: float = 0.99,
    mb: float = 1.0,
    b1: Timing | None = None,
    b64: Timing | None = None,
    **changes: Any,
) -> list[Record]:
    """A record for each seed, from 0 on."""
    latency_ms = {batch: found for batch, found in (("1", b1), ("64", b64)) if found}
    records = []
    for seed, accuracy in enumerate(validation):
        measurement = replace(make_measurement(test), file_mb=mb, latency_ms=latency_ms, latency_session="s")
        records.append(replace(make_record(model, seed, onnxruntime=measurement), validation_acc=accuracy, **changes))
    return records


def winners_of(*rows: list[Record]) -> Winners:
    winners = find_winners([record for runs in rows for record in runs])
    assert winners is not None
    return winners


def names(winners: Winners) -> dict[str, str]:
    return {prize: winner.name for prize, winner in winners.by_prize.items()}


BEST = row("Best", 0.9900, 0.9902, 0.9904, mb=3, b1=timing(3), b64=timing(30))
SMALL = row("Small", 0.9893, 0.9895, 0.9895, mb=1, b1=timing(2), b64=timing(20))
QUICK = row("Quick", 0.9895, 0.9896, 0.9898, mb=2, b1=timing(1), b64=timing(25))
CRUDE = row("Crude", 0.9880, 0.9881, 0.9882, mb=0.1, b1=timing(0.1), b64=timing(1))


def test_winners_are_as_accurate_as_the_best_within_a_tenth_of_a_point() -> None:
    winners = winners_of(BEST, SMALL, QUICK, CRUDE)
    expected = {
        "most accurate": "Best",
        "smallest": "Small",
        "fastest at batch 1": "Quick",
        "fastest at batch 64": "Small",
    }
    assert names(winners) == expected
    assert {candidate.name for candidate in winners.within} == {"Best", "Small", "Quick"}
    assert winners.num_rows == 4


def test_exactly_a_tenth_of_a_point_counts() -> None:
    assert names(winners_of(row("Best", 0.99), row("Small", 0.989, mb=0.1)))["smallest"] == "Small"


def test_validation_decides_and_test_does_not() -> None:
    winners = winners_of(row("Best", 0.99, test=0.97), row("Lucky", 0.98, test=0.999, mb=0.1))
    assert set(names(winners).values()) == {"Best"}


def test_a_row_that_varies_much_does_not_gain_by_it() -> None:
    varied = row("Varied", 0.97, 0.99, 0.992, mb=0.1)  # 0.62 ± 2.9 points below
    assert names(winners_of(BEST, varied))["smallest"] == "Best"


def test_seeds_are_compared_with_their_own() -> None:
    """Of a row with fewer seeds those that it lacks do not count, be they easy or hard."""
    best = row("Best", 0.980, 0.999, 0.999)
    assert names(winners_of(best, row("Small", 0.980, mb=0.1)))["smallest"] == "Small"


def test_as_fast_as_the_fastest_is_what_lies_within_its_quartiles() -> None:
    noisy = row("Noisy", 0.9895, b1=timing(1.0, 1.3))
    near, far = row("Near", 0.99, b1=timing(1.2)), row("Far", 0.9899, b1=timing(1.4))
    assert names(winners_of(noisy, near, far))["fastest at batch 1"] == "Near"


def test_of_equals_the_smaller_wins() -> None:
    winners = winners_of(row("One", 0.99, mb=2), row("Two", 0.99, mb=1))
    assert names(winners) == {"most accurate": "Two", "smallest": "Two"}


@pytest.mark.parametrize("other", ["cpu", "threads"])
def test_times_of_other_conditions_are_not_compared(other: str) -> None:
    elsewhere = row("Elsewhere", 0.99, b1=timing(0.1))
    for record in elsewhere:
        if other == "threads":
            record.measurements["onnxruntime"].threads = 8
        else:
            record.machine = Machine(cpu="there", cores=2, system="Linux", python="3.11")
    winners = winners_of(BEST, SMALL, elsewhere)
    assert names(winners)["fastest at batch 1"] == "Small"
    assert "not compared in speed, as not timed on 1 thread, here: Elsewhere" in format_winners(winners, FOLDER)


def test_what_was_not_timed_may_be_the_smallest_only() -> None:
    winners = winners_of(BEST, row("Untimed", 0.99, 0.99, 0.99, mb=0.1))
    assert names(winners) == {"most accurate": "Best", "smallest": "Untimed"} | {
        f"fastest at batch {batch}": "Best" for batch in (1, 64)
    }


def test_at_most_six_lines_name_the_file_of_the_lowest_seed() -> None:
    lines = format_winners(winners_of(BEST, SMALL, QUICK, CRUDE), FOLDER).splitlines()
    assert len(lines) <= 6
    assert lines[0].startswith(
        "what to deploy: 3 of 4 rows are within 0.1 points of the best validation accuracy (99.02 %"
    )
    assert any(line.startswith("most accurate: ") and line.endswith("checkpoints/x/Best-seed0.onnx") for line in lines)
    assert any(
        "smallest, fastest at batch 64: " in line and "1.000 MB" in line and "20.000 ms b64" in line for line in lines
    )


def test_one_seed_decides_nothing() -> None:
    assert "one seed decides nothing" in format_winners(winners_of(row("Best", 0.99)), FOLDER)
    assert "decides nothing" not in format_winners(winners_of(BEST), FOLDER)


def test_winner_whose_interval_reaches_beyond_is_named() -> None:
    sure = row("Sure", 0.9897, 0.9899, 0.9901, mb=0.5)  # 0.03 points at each seed
    assert winners_of(BEST, sure).notes == ()
    assert any("Small" in note and "interval" in note for note in winners_of(BEST, SMALL).notes)


def test_section_in_markdown_says_what_decides() -> None:
    text = write_up_winners(winners_of(BEST, SMALL), FOLDER)
    assert "| `checkpoints/x/Small-seed0.onnx` |" in text
    assert "99.00 ± 0.00" in text
    assert "nan" not in write_up_winners(winners_of(row("Best", 0.99)), FOLDER)


def test_without_a_measurement_in_onnx_runtime_there_is_no_winner() -> None:
    assert find_winners([make_record(pytorch=make_measurement())]) is None
    assert format_winners(None, FOLDER) == write_up_winners(None, FOLDER) == ""
