"""What the README prints is run as printed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mnist_lab.export import export_onnx
from mnist_lab.models import PRESETS, build_model
from mnist_lab.training import torch_predictor

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_client_runs_an_artifact_without_the_suite(tmp_path: Path) -> None:
    (client,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len([line for line in client.splitlines() if line]) == 6
    torch.manual_seed(0)
    model = build_model(PRESETS["compact"].student(0.13, 0.31)).eval()
    export_onnx(model, tmp_path / "model.onnx", {"parent_sha256": "0"})
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    (tmp_path / "client.py").write_text(client)
    done = subprocess.run(
        [sys.executable, "client.py", "model.onnx", "pixels.npy"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = torch_predictor(model)(pixels.reshape(-1, 1, 28, 28).astype(np.float32) / np.float32(255)).argmax(axis=1)
    assert done.stdout.strip() == str(expected)
    assert set(re.findall(r"^import (\w+)", client, flags=re.M)) == {"sys", "numpy", "onnxruntime"}


def test_files_that_it_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"python (\w+\.py)", README):
        assert (ROOT / name).is_file(), name


def test_table_is_the_reference_runs() -> None:
    table = pd.read_csv(ROOT / "docs" / "reference-run" / "table.csv")
    printed = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if "onnxruntime |" in line
    ]
    printed += [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if "pytorch  " in line]
    assert len(printed) == len(table)
    rows = table.set_index(["model", "runtime"])
    for model, precision, runtime, accuracy, mib, *latencies, _ in printed:
        row = rows.loc[(model, runtime)]
        assert precision == row["precision"]
        assert accuracy == f"{100 * row['test_acc']:.2f} ± {100 * row['test_acc_ci95']:.2f}"
        assert float(mib) == pytest.approx(row["size_mib"], abs=5e-4)
        for batch, latency in zip((1, 64, 1024), latencies, strict=True):
            assert float(latency) == pytest.approx(row[f"latency_ms_b{batch}"], rel=0.02)
