"""What the README and the pages behind it print: the code runs, the files are there, the figures were measured."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import spec

from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.experiments.rows import TABLE, families
from mnist_lab.models import PRESETS, build_model
from mnist_lab.report.figures import FIGURES, OF_COMPRESSED
from mnist_lab.report.records import load_records
from mnist_lab.report.table import build_table
from mnist_lab.report.text import format_fastest, format_summary
from mnist_lab.training import torch_predictor

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
MAX_FRONT_PAGE_LINES = 130


def test_front_page_is_short() -> None:
    assert len(README.splitlines()) <= MAX_FRONT_PAGE_LINES


def test_client_runs_an_artifact_without_the_suite(tmp_path: Path) -> None:
    (client,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len([line for line in client.splitlines() if line]) == 6
    torch.manual_seed(0)
    model = build_model(PRESETS["compact"].student(spec())).eval()
    write_onnx(model, tmp_path / "model.onnx", {"model": "x"})
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    scripts = re.findall(r"python (\w+\.py)", text) + re.findall(r"^\| `(\w+\.py)` \|", text, flags=re.M)
    modules = re.findall(r"python -m (benchmarks\.\w+)", text)
    for name in [*scripts, *(module.replace(".", "/") + ".py" for module in modules)]:
        assert (ROOT / name).is_file(), name


def test_tables_are_the_reference_runs() -> None:
    folder = DOCS / "reference-run"
    table = build_table(load_records(folder), order=families(TABLE))
    summary = format_summary(table, style="github")
    assert summary in (folder / "table.md").read_text()
    (shown,) = re.findall(r"<!-- table -->\n(.*?)\n<!-- /table -->", README, flags=re.S)
    assert set(shown.splitlines()) <= set(summary.splitlines())
    assert set(re.findall(r"^\| (\w+)", shown, flags=re.M)) == {"model", *table["model"]}
    fastest = f"<!-- fastest -->\n{format_fastest(table, style='github')}\n<!-- /fastest -->"
    assert fastest in (DOCS / "latency.md").read_text()


def test_curve_is_the_reference_runs() -> None:
    found = build_table(load_records(DOCS / "reference-run" / "curve")).query("runtime == 'onnxruntime'")
    table = found.set_index("model")
    rows = re.findall(r"^\| [^|]*kB \|.*$", (DOCS / "curve.md").read_text(), flags=re.M)
    assert len(rows) == 7
    shape = ""
    for row in rows:
        best, num_bytes, accuracy, *_ = [cell.strip() for cell in row.split("|")[3:]]
        shape = best.partition("`")[2].partition("`")[0] or shape
        model = f"{'KD' if 'taught' in best else 'FFN'}_small_QAT-{shape}"
        assert f"{100 * table.test_acc[model]:.2f} ± {100 * table.test_acc_ci95[model]:.2f}" == accuracy
        assert int(num_bytes.replace(",", "")) == pytest.approx(1e6 * table.file_mb[model], abs=100)  # of one seed


def test_verdicts_are_the_reference_runs() -> None:
    claims = DOCS / "reference-run" / "claims"
    suites = ("claims", "claims_compression", "claims_few_bits", "claims_transfer", "claims_distillation")
    settled = "".join((claims / f"{suite}.md").read_text() for suite in suites)
    verdicts = re.findall(r"^## (\d+)\. .*: (\w+)$", settled, flags=re.M)
    assert re.findall(r"^\| (\d+) \| .* \| (\w+):", (DOCS / "claims.md").read_text(), flags=re.M) == verdicts
    assert [int(claim) for claim, _ in verdicts] == list(range(1, 29))


def test_scripts_headers_name_the_reference_runs_results() -> None:
    folder = DOCS / "reference-run"
    table = build_table(load_records(folder)).query("runtime == 'onnxruntime'").set_index("model")
    acc = {
        model: f"{100 * row['test_acc']:.2f} ± {100 * row['test_acc_ci95']:.2f} %" for model, row in table.iterrows()
    }
    size = {model: f"{row['size_mib']:.3f} MiB" for model, row in table.iterrows()}
    claims = (folder / "claims" / "claims.md").read_text()
    found = re.findall(r"^\| (?:share of threes|the same before).*?\+([\d.]+)", claims, re.M)
    corrected, before = (f"{100 * float(share):.0f} %" for share in found)
    int8 = ("FFN_PTQ_INT8", "Sparse_MoE_INT8", "Sparse_MoE_PTQ")
    compressed = build_table(load_records(folder / "compression")).drop_duplicates("model").set_index("model")
    pruned = {"90 % zeros": "pruned-0.9", "half the width": "narrower", "one expert": "fewer_experts-1"}

    def points(model: str) -> str:
        return "{acc_points:+.2f} ± {acc_points_ci95:.2f}".format(**compressed.loc[model]).replace("-", "−")

    students = ("KD_FFN_Student", "KD_FFN_Student_from_FFN", "FFN_Student_no_KD")
    expected = {
        "baseline_mnist": [acc["FFN_baseline"]],
        "moe_mnist": [acc["Sparse_MoE"]],
        "ptq_mnist": [f"{acc[model]}, {size[model]}" for model in int8],
        "kd_mnist": [acc[model] for model in students],
        "run_all_experiments": [f"FFN {acc['FFN_baseline']}, MoE {acc['Sparse_MoE']}, student {acc['KD_FFN_Student']}"],
        "claims_mnist": [f"{len(re.findall(r'^## .*: supported$', claims, re.M))} of 14 supported"],
        "dark_knowledge_mnist": [f"{before} of the threes, {corrected} with the bias corrected"],
        "prune_mnist": [", ".join(f"{text} {points(f'Sparse_MoE_{row}-self')}" for text, row in pruned.items())],
        "adapt_mnist": [],  # no reference run has its rows
        "compare_onnx": [],
        "classify": [],
        "deploy_mnist": [],
        "qat_mnist": [],
        "sweep": [],
        "visualize_results": [f"{len(FIGURES) - len(OF_COMPRESSED)} plots a folder"],
    }
    assert {path.stem for path in ROOT.glob("*.py")} == set(expected)
    for script, results in expected.items():
        header = (ROOT / f"{script}.py").read_text().split('"""')[1]
        assert re.findall(r"expect (.*?)$", header, re.M) == results, script
