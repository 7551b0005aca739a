"""A user's own folders of images, from the images to the table, by the scripts."""

from pathlib import Path
from typing import NamedTuple

import foreign_models
import pandas as pd
import pytest
from own_images import draw_letters, draw_shapes
from test_scripts import Bench, bench, run  # noqa: F401

from mnist_lab.experiments.rows import TABLE
from mnist_lab.models.checkpoints import load_checkpoint, read_metadata
from mnist_lab.report import figures
from mnist_lab.report.records import load_records

pytestmark = pytest.mark.slow
QUICK = ("--recipe", "quick", "--epochs", "1")
OF = {"letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "shapes": ("circle", "square", "triangle")}


class Made(NamedTuple):
    """What the whole suite came to on a folder of images."""

    name: str
    folder: Path

    def find(self, kind: str) -> Path:
        """Where it is filed."""
        (found,) = (self.folder / kind).glob(f"{self.name}-*-compact-quick")
        return found


@pytest.fixture(scope="module", params=OF)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of 26 letters, and of three shapes of 20x30 pixels."""
    name, folder = request.param, tmp_path_factory.mktemp("own")
    if name == "letters":
        draw_letters(folder / name, num_each=12)
    else:
        draw_shapes(folder / name, num_each=40)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        code = run("run_all_experiments", ["--mode", "load", "--dataset", f"folder:{name}", *QUICK], monkeypatch)
    assert code == 0
    return Made(name, folder)


def test_own_images_come_to_a_table_and_plots(made: Made) -> None:
    table = pd.read_csv(made.find("results") / "table.csv")
    assert set(table["model"]) == {f"{row.name}-epochs1" for row in TABLE}
    assert table["latency_ms_b64"].notna().all()
    drawn = {path.stem for path in (made.find("results") / "plots").glob("*.png")}
    assert drawn == figures.FIGURES.keys() - figures.OF_COMPRESSED.keys()
    for record in load_records(made.find("results")):
        assert record.class_names == list(OF[made.name])
        assert len(next(iter(record.measurements.values())).confusion) == len(OF[made.name])


def test_checkpoints_know_classes_size_and_ground(made: Made) -> None:
    path = made.find("checkpoints") / "Sparse_MoE-epochs1-seed0.safetensors"
    data = load_checkpoint(path).model.config.data
    assert data.classes == data.class_names == OF[made.name]
    expected = {"letters": ((28, 28), "dark-on-light"), "shapes": ((20, 30), "light-on-dark")}
    assert (data.image_size, data.polarity) == expected[made.name]
    assert f"{read_metadata(path)['dataset']}-compact-quick" == path.parent.name


def test_its_figures_are_drawn_again_by_folder_or_name(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.folder)
    drawn: list[str] = []

    def draw(results: Path, _: object) -> list[Path]:
        drawn.append(results.name)
        return []

    monkeypatch.setattr(figures, "draw_all", draw)
    filed = made.find("results").name
    for dataset in (f"folder:{made.name}", filed.removesuffix("-compact-quick")):
        assert run("visualize_results", ["--dataset", dataset], monkeypatch) == 0
    assert drawn == [filed] * 2
    assert run("visualize_results", ["--dataset", "mnist"], monkeypatch) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        "moe_mnist --batch-size 32 --num-experts 3",
        "ptq_mnist --model moe --mode fused --runtime onnxruntime",
        "ptq_mnist --mode weight-only --bits 4",
        "ptq_mnist --mode static --runtime openvino",
        "qat_mnist --model moe --bits 2",
        "kd_mnist --windows 8x5s2 --hidden 16",
        "kd_mnist --data noise --num-images 300",
        "kd_mnist --student moe --student-experts 3 --student-width 16",
        "prune_mnist weights --model ffn --ratio 0.5",
        "prune_mnist experts --keep 2",
    ],
)
def test_every_technique_takes_own_images(made: Made, monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    monkeypatch.chdir(made.folder)
    script, *options = arguments.split()
    assert run(script, [*options, *QUICK, "--dataset", f"folder:{made.name}"], monkeypatch) == 0


def test_images_as_they_are_show_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_shapes(tmp_path / "shapes", num_each=40)
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", "folder:shapes", "--image-size", "16", "--epochs", "1", "--no-augmentation"]
    assert run("baseline_mnist", arguments, monkeypatch) == 0
    (path,) = tmp_path.glob("checkpoints/shapes-*-16x16-compact-standard/*.safetensors")
    assert path.stem == "FFN_baseline-epochs1-no-augmentation-seed0"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("baseline_mnist --dataset folder:nowhere", "nowhere cannot be read"),
        ("baseline_mnist --dataset csv:letters", "letters is not a file"),
        ("baseline_mnist --dataset idx:letters", "train-images-idx3-ubyte cannot be read"),
        ("baseline_mnist --dataset folder:letters/A", "no class folders"),
        ("baseline_mnist --dataset folder:letters --data-dir .", "--data-dir"),
        ("baseline_mnist --dataset folder:letters --image-size 3", "--image-size 3"),
        ("baseline_mnist --dataset digits --image-size 32", "--image-size is for own data"),
        ("adapt_mnist --dataset folder:letters --source-dataset digits", "digits has 10 classes, letters-"),
        ("kd_mnist --dataset folder:shapes --data digits", "is needed first"),
        ("dark_knowledge_mnist --dataset folder:shapes", "3 classes; one is left out, the fourth"),
        (
            "kd_mnist --dataset folder:shapes --no-distillation --pool 4",
            "sides of an image, 20 and 30",
        ),
        ("visualize_results --dataset cifar", "--dataset cifar is none of"),
    ],
)
def test_bad_input_ends_with_exit_code_2(bench: Bench, arguments: str, says: str) -> None:  # noqa: F811
    draw_letters(bench.folder / "letters", num_each=5)
    draw_shapes(bench.folder / "shapes", num_each=40)
    script, *options = arguments.split()
    quick = () if script in {"dark_knowledge_mnist", "visualize_results"} else QUICK
    bench.expect_user_error(script, *options, *quick, says=says, quick=False)


def test_model_made_elsewhere_is_compared_on_resized_images(bench: Bench) -> None:  # noqa: F811
    draw_shapes(bench.folder / "shapes", num_each=40)
    model = foreign_models.linear_classifier(num_classes=3, height=12, width=16)
    foreign_models.save(model, bench.folder / "net.onnx")
    outcome = bench("compare_onnx", "net.onnx", "--dataset", "folder:shapes", "--image-size", "12", "16", quick=False)
    assert outcome.code == 0, outcome.err
    (table,) = (bench.folder / "results").glob("shapes-*-12x16-onnx-net/table.csv")
    assert "net.onnx" in set(pd.read_csv(table)["model"])
