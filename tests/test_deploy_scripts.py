"""`classify.py` and `deploy_mnist.py`, and the client of docs/deploying.md, on digits drawn on large sheets."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from test_scripts import Bench, bench, run  # noqa: F401  a fixture

from mnist_lab.data import load_dataset

ROOT = Path(__file__).parents[1]
MODEL = Path("checkpoints/digits-compact-quick/FFN_baseline-seed0.onnx")
NUM_DIGITS = 100
LEAST_RIGHT = 0.75  # of these digits, which are not centred by their mass: 95 % as they are
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with the digits of the test split, each in black on a white sheet."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert run("baseline_mnist", ["--dataset", "digits", "--recipe", "quick"], monkeypatch) == 0
    (folder / "sheets").mkdir()
    generator = np.random.default_rng(0)
    pixels, labels = load_dataset("digits").load_test().numpy()
    for number, (image, label) in enumerate(zip(pixels[:NUM_DIGITS, 0], labels, strict=False)):
        file = folder / "sheets" / f"{number:02}-{label}.{'jpg' if number % 2 else 'png'}"
        put_on_sheet(np.round(255 * image).astype(np.uint8), generator).save(file)
    return folder


def put_on_sheet(image: npt.NDArray[np.uint8], generator: np.random.Generator) -> Image.Image:
    side = int(generator.integers(28, 121))
    sheet = Image.new("L", (200, 150), 255)
    digit = Image.fromarray(255 - np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)))
    sheet.paste(digit, (int(generator.integers(0, 201 - side)), int(generator.integers(0, 151 - side))))
    return sheet


@pytest.fixture
def trained_bench(bench: Bench, trained: Path) -> Bench:  # noqa: F811
    shutil.copytree(trained, bench.folder, dirs_exist_ok=True)
    return bench


def sheets(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted((folder / "sheets").iterdir())]


def share_right(found: dict[str, str]) -> float:
    return float(np.mean([Path(file).stem.endswith(f"-{label}") for file, label in found.items()]))


def test_digits_on_sheets_are_recognised(trained_bench: Bench) -> None:
    files = sheets(trained_bench.folder)
    outcome = trained_bench("classify", *files, "--model", str(MODEL), quick=False)
    assert outcome.code == 0, outcome.err
    lines = [re.fullmatch(r"(.*): class (\d) \((\d+\.\d) %\)", line) for line in outcome.out.splitlines()]
    found = {line[1]: line[2] for line in lines if line}
    assert list(found) == files
    assert share_right(found) >= LEAST_RIGHT
    assert all(10 <= float(line[3]) <= 100 for line in lines if line)
    as_they_are = trained_bench("classify", *files, "--model", str(MODEL), "--as-is", quick=False)
    assert share_right(dict(re.findall(r"(.*): class (\d)", as_they_are.out))) < 0.4


def test_client_in_the_docs_does_the_same(trained_bench: Bench) -> None:
    folder = trained_bench.folder
    (client,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploying.md").read_text(), flags=re.S)
    assert set(re.findall(r"^(?:import|from) (\w+)", client, flags=re.M)) == {"sys", "numpy", "onnxruntime", "PIL"}
    (folder / "client.py").write_text(client)
    files = sheets(folder)
    command = [sys.executable, "client.py", str(MODEL), *files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"(.*): (\d)", done.stdout))
    assert list(found) == files
    assert share_right(found) >= LEAST_RIGHT
    outcome = trained_bench("classify", *files, "--model", str(MODEL), quick=False)
    suite = dict(re.findall(r"(.*): class (\d)", outcome.out))
    assert np.mean([found[file] == suite[file] for file in files]) >= 0.9


def test_what_cannot_be_read_is_named_and_the_rest_classified(trained_bench: Bench) -> None:
    (trained_bench.folder / "text.png").write_text("no image")
    first, second = sheets(trained_bench.folder)[:2]
    arguments = [first, "text.png", second, "nowhere.png", "--model", str(MODEL)]
    outcome = trained_bench("classify", *arguments, quick=False)
    assert outcome.code == 2
    assert [line.partition(":")[0] for line in outcome.out.splitlines()] == [first, second]
    assert [line.split()[:2] for line in outcome.err.splitlines()[:2]] == [["error:", "text.png"], ["error:", "there"]]
    assert outcome.err.splitlines()[2:] == ["error: 2 of 4 images could not be read"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("classify sheets/00-3.png --model nowhere.onnx", "no artifact at nowhere.onnx"),
        ("classify --model checkpoints/x.onnx", "name at least one image file"),
        ("classify sheets/00-3.png", "--model"),
        (f"deploy_mnist {MODEL}", "--output"),
        (f"deploy_mnist {MODEL} --output {MODEL}", "the artifact itself"),
        (f"deploy_mnist {MODEL} --output copy.txt", "ends in .onnx"),
        ("deploy_mnist nowhere.onnx --output copy.onnx", "no artifact at nowhere.onnx"),
        (f"deploy_mnist {MODEL.with_suffix('.json')} --output copy.onnx", "is broken"),
    ],
)
def test_bad_input_ends_with_exit_code_2(trained_bench: Bench, arguments: str, says: str) -> None:
    trained_bench.expect_user_error(*arguments.split(), says=says, quick=False)


def test_copy_says_what_it_takes_gives_and_assumes(trained_bench: Bench) -> None:
    outcome = trained_bench("deploy_mnist", str(MODEL), "--probabilities", "--output", "to/hand/on.onnx", quick=False)
    assert outcome.code == 0, outcome.err
    assert "pixels, float32 (batch, 1, 28, 28), bytes / 255, light-on-dark" in outcome.out
    assert "logits, probabilities, class; classes: 0, 1, 2" in outcome.out
    assert re.search(r"test accuracy: \d\d\.\d\d% of 360 images, in onnxruntime", outcome.out)
    card = json.loads((trained_bench.folder / "to" / "hand" / "on.json").read_text())
    assert (card["file"], card["interface"]["outputs"]) == ("on.onnx", ["logits", "probabilities", "class"])
    copied = trained_bench("classify", *sheets(trained_bench.folder), "--model", "to/hand/on.onnx", quick=False)
    original = trained_bench("classify", *sheets(trained_bench.folder), "--model", str(MODEL), quick=False)
    assert copied.out == original.out


def test_classifying_needs_no_torch() -> None:
    code = "import sys, classify, deploy_mnist; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
