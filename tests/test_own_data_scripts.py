"""A user's own folders of images, from the images to the table, by the scripts."""

from pathlib import Path

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole suite has run once on 26 letters, and on three shapes of 20x30 pixels."""
    folder = tmp_path_factory.mktemp("own")
    draw_letters(folder / "letters", num_each=12)
    draw_shapes(folder / "shapes", num_each=40)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for name in OF:
            code = run("run_all_experiments", ["--mode", "load", "--dataset", f"folder:{name}", *QUICK], monkeypatch)
            assert code == 0
    return folder


def find(folder: Path, name: str, kind: str = "results") -> Path:
    """The one folder in which what became of a folder of images is filed."""
    (found,) = (folder / kind).glob(f"{name}-*-compact-quick")
    return found


@pytest.mark.parametrize(("name", "classes"), OF.items())
def test_own_images_come_to_a_table_and_plots(folder: Path, name: str, classes: tuple[str, ...]) -> None:
    table = pd.read_csv(find(folder, name) / "table.csv")
    assert set(table["model"]) == {f"{row.name}-epochs1" for row in TABLE}
    assert table["latency_ms_b64"].notna().all()
    drawn = {path.stem for path in (find(folder, name) / "plots").glob("*.png")}
    assert drawn == figures.FIGURES.keys() - figures.OF_COMPRESSED.keys()
    for record in load_records(find(folder, name)):
        assert record.class_names == list(classes)
        assert len(next(iter(record.measurements.values())).confusion) == len(classes)


@pytest.mark.parametrize(("name", "classes"), OF.items())
def test_checkpoints_know_classes_size_and_ground(folder: Path, name: str, classes: tuple[str, ...]) -> None:
    path = find(folder, name, "checkpoints") / "Sparse_MoE-epochs1-seed0.safetensors"
    data = load_checkpoint(path).model.config.data
    assert data.classes == data.class_names == classes
    assert (data.image_size, data.polarity) == {
        "letters": ((28, 28), "dark-on-light"),
        "shapes": ((20, 30), "light-on-dark"),
    }[name]
    assert f"{read_metadata(path)['dataset']}-compact-quick" == path.parent.name


def test_its_figures_are_drawn_again_by_folder_or_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    drawn: list[str] = []

    def draw(results: Path, _: object) -> list[Path]:
        drawn.append(results.name)
        return []

    monkeypatch.setattr(figures, "draw_all", draw)
    filed = find(folder, "letters").name.removesuffix("-compact-quick")
    for dataset in ("folder:letters", filed):
        assert run("visualize_results", ["--dataset", dataset], monkeypatch) == 0
    assert drawn == [find(folder, "letters").name] * 2
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
        "kd_mnist --data synthetic --num-images 300",
        "kd_mnist --student moe --student-experts 3 --student-width 16",
        "prune_mnist weights --model ffn --ratio 0.5",
        "prune_mnist experts --keep 2",
    ],
)
@pytest.mark.parametrize("name", OF)
def test_every_technique_takes_own_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: str
) -> None:
    monkeypatch.chdir(folder)
    script, *options = arguments.split()
    assert run(script, [*options, *QUICK, "--dataset", f"folder:{name}"], monkeypatch) == 0


def test_images_as_they_are_show_in_the_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    arguments = ["--dataset", "folder:shapes", "--image-size", "16", "--epochs", "1", "--no-augmentation"]
    assert run("baseline_mnist", arguments, monkeypatch) == 0
    (path,) = folder.glob("checkpoints/shapes-*-16x16-compact-standard/*.safetensors")
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
        ("kd_mnist --dataset folder:shapes --data digits", "Sparse_MoE-epochs1 is needed first"),
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
