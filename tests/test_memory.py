"""What a computation takes at its peak."""

import subprocess
import sys

import torch

from mnist_lab.memory import measure_peak

NUM, SIZE = 1000, 4


def test_what_is_freed_makes_room_and_what_was_there_does_not_count() -> None:
    rows = torch.ones(NUM)

    def compute() -> torch.Tensor:
        two = rows * 2
        three = two + 1  # both are there
        del two
        return three - 1  # in the room of the first

    result, peak = measure_peak(compute)
    assert torch.equal(result, torch.full((NUM,), 2.0))
    assert peak == 2 * NUM * SIZE


def test_views_and_results_in_place_take_nothing() -> None:
    rows = torch.ones(NUM)
    assert measure_peak(lambda: rows.view(10, 100).T[:5])[1] == 0
    assert measure_peak(lambda: rows.add_(1).relu_())[1] == 0
    assert measure_peak(lambda: (rows + 1).view(10, 100).add_(1).split(5))[1] == NUM * SIZE


def test_gradients_keep_what_forward_passes_free() -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(50, 50) for _ in range(8)))
    rows = torch.ones(NUM, 50)
    with torch.inference_mode():
        forward = measure_peak(lambda: layers(rows))[1]
    assert forward == 2 * rows.nbytes
    assert measure_peak(lambda: layers(rows).sum().backward())[1] > 4 * forward


def test_after_it_nothing_is_counted_any_more() -> None:
    kept, peak = measure_peak(lambda: torch.ones(NUM))
    assert (kept + 1).sum() == 2 * NUM
    assert peak == NUM * SIZE


def test_compiler_is_not_imported_for_it() -> None:
    code = "import sys, torch; from mnist_lab.memory import measure_peak as m; m(lambda: torch.ones(3) + 1)"
    code += "; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
