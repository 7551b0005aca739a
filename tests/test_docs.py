"""The code in docs/architecture.md is run as printed."""

import re
from pathlib import Path
from typing import Any

import pytest
from tiny import make_dataset, make_lab

from mnist_lab.experiments.make import make
from mnist_lab.experiments.run import Run
from mnist_lab.report.columns import COLUMNS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def test_examples_of_technique_metric_and_model_work(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), flags=re.S):
        exec(block, names)
    lab = make_lab(tmp_path, dataset=make_dataset(num_train=1100), columns=(*COLUMNS, names["ZEROS"]))
    record = make(Run(lab, names["ZEROED_INT8"], 0))
    assert (record.technique, record.original) == ("zeroed + static ptq", "FFN_baseline")
    assert record.figures == {"zeros": None}
    zeros = make(Run(lab, names["ZEROED"], 0)).figures["zeros"]
    assert zeros is not None
    assert zeros >= 0.49
    assert make(Run(lab, names["DEEP"], 0)).model == "FFN_deep"
