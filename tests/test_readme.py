"""What the README prints is run as printed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tiny import spec

from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.models import PRESETS, build_model
from mnist_lab.report.records import build_table, format_fastest, format_summary, load_records
from mnist_lab.training import torch_predictor

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_client_runs_an_artifact_without_the_suite(tmp_path: Path) -> None:
    (client,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len([line for line in client.splitlines() if line]) == 6
    torch.manual_seed(0)
    model = build_model(PRESETS["compact"].student(spec())).eval()
    write_onnx(model, tmp_path / "model.onnx", {"parent_sha256": "0"})
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


def test_tables_are_the_reference_runs() -> None:
    folder = ROOT / "docs" / "reference-run"
    table = build_table(load_records(folder))
    summary = format_summary(table, style="github")
    assert summary in (folder / "table.md").read_text()
    (shown,) = re.findall(r"<!-- table -->\n(.*?)\n<!-- /table -->", README, flags=re.S)
    assert set(shown.splitlines()) <= set(summary.splitlines())
    assert set(re.findall(r"^\| (\w+)", shown, flags=re.M)) == {"model", *table["model"]}
    assert f"<!-- fastest -->\n{format_fastest(table, style='github')}\n<!-- /fastest -->" in README


def test_verdicts_are_the_reference_runs() -> None:
    settled = (ROOT / "docs" / "reference-run" / "claims" / "claims.md").read_text()
    verdicts = re.findall(r"^## (\d+)\. .*: (\w+)$", settled, flags=re.M)
    assert re.findall(r"^\| (\d+) \| .* \| (\w+):", README, flags=re.M) == verdicts
    assert [int(claim) for claim, _ in verdicts] == list(range(1, 15))
