"""The page of a results folder: what it says, and that nothing in it comes from outside or runs by itself."""

import base64
import gzip
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from builders import make_measurement, make_record
from test_figures import small_figure

from mnist_lab.report.findings import load_findings
from mnist_lab.report.page import Surroundings, build_page, find_mistakes, make_sheets, write_page
from mnist_lab.report.page_demo import MAX_MODELS, Demo, DemoModel, order_for_demo, pack
from mnist_lab.report.page_figures import draw_pictures
from mnist_lab.report.page_images import TestImages, as_png, choose_images, describe_experts
from mnist_lab.report.page_verdicts import find_sentences, find_tiles
from mnist_lab.report.records import save_predictions
from mnist_lab.report.results import Results
from mnist_lab.studies.claims.findings import Claim, write_claims

ROOT = Path(__file__).parents[1]
HOSTILE = "Sparse_MoE<script>alert(1)</script>\"'&"
NONE_DRAWN = Surroundings(figures={}, demo_missing="not asked for")


class Reader(HTMLParser):
    """Elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_results() -> Results:
    return Results(
        [
            *(make_record(seed=seed, onnxruntime=make_measurement(0.97 + seed / 100)) for seed in range(2)),
            make_record(HOSTILE, onnxruntime=make_measurement(0.99, size_mib=3.0, b64=4.0)),
            make_record("FFN_PTQ_INT8", onnxruntime=make_measurement(0.96, size_mib=0.25, b64=0.5)),
        ]
    )


def build(results: Results | None = None, surroundings: Surroundings = NONE_DRAWN, folder: Path = Path("none")) -> str:
    return build_page(folder, results or make_results(), surroundings)


def test_page_loads_nothing_and_runs_its_own_scripts_alone() -> None:
    demo = Demo("engine", pack(b"export {}"), pack(b"wasm"), [DemoModel(HOSTILE, pack(b"model"))], "")
    data = {"num_classes": 2, "image_size": [2, 2], "classes": ["</script>", "b"]}
    results = Results([replace(record, architecture={"data": data}) for record in make_results().records])
    page = build(results, replace(NONE_DRAWN, demo=demo, winner=["<img src=x onerror=alert(1)>"]))
    reader = Reader(page)
    addresses = [
        value for _, attributes in reader.elements for name, value in attributes.items() if name in {"src", "href"}
    ]
    assert addresses
    assert all(address and re.match("data:|#", address) for address in addresses)
    assert not re.search(r"url\(|@import|https?://", page)
    runs = [attributes for attributes in reader.all("script") if "type" not in attributes]
    policy = next(own["content"] for own in reader.all("meta") if own.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert len(runs) == 2 == policy.count("'sha256-")
    assert "default-src 'none'" in policy
    assert not any(name.startswith("on") for _, attributes in reader.elements for name in attributes)
    assert not reader.all("img")


def test_page_shows_hostile_names_as_text() -> None:
    page = build(Results([replace(record, dataset="<b>data") for record in make_results().records]))
    assert "<script>alert" not in page
    assert "<b>data" not in page
    assert HOSTILE in "".join(Reader(page).texts)


def test_page_has_every_cell_of_the_tables() -> None:
    results = make_results()
    reader = Reader(build(results))
    texts = set(reader.texts)
    sheets = make_sheets(results)
    assert [sheet.title for sheet in sheets] == [
        "Summary", "Every column", "Against the original and the baseline", "Fastest runtime",
    ]  # fmt: skip
    assert {str(column.name) for column in results.columns if not column.name.startswith("latency")} <= texts
    for sheet in sheets:
        assert {cell.text for row in sheet.rows for cell in row if cell.text} <= texts


def test_tables_sort_by_numbers_and_can_be_copied() -> None:
    columns = next(sheet for sheet in make_sheets(make_results()) if sheet.name == "columns")
    accuracy = columns.headers.index("test_acc")
    assert [row[accuracy].number for row in columns.rows] == ["0.96", "0.975", "0.99"]
    assert [row[accuracy].text for row in columns.rows] == ["0.9600", "0.9750", "0.9900"]
    assert {row[columns.headers.index("model")].number for row in columns.rows} == {""}
    summary = next(sheet for sheet in make_sheets(make_results()) if sheet.name == "summary")
    assert [row[summary.headers.index("acc")].number for row in summary.rows] == ["96.0", "97.5", "99.0"]
    assert columns.csv.splitlines()[0] == ",".join(columns.headers)
    assert r"\toprule" in columns.latex
    assert r"test\_acc" in columns.latex
    assert r"FFN\_PTQ\_INT8" in columns.latex
    assert r"\$\pm\$" not in summary.latex
    assert r"$\pm$" in summary.latex


def test_verdicts_name_the_best_and_what_was_paid() -> None:
    tiles = {tile.what: tile for tile in find_tiles(make_results())}
    assert (tiles["Most accurate"].figure, tiles["Most accurate"].model) == ("99.00 %", HOSTILE)
    assert tiles["Fastest for a batch of 64"].model == "FFN_PTQ_INT8"
    assert "Fastest for one image" not in tiles
    sentences = find_sentences(make_results(), [])
    assert any(sentence.endswith(f"at once: FFN_PTQ_INT8, FFN_baseline and {HOSTILE}.") for sentence in sentences)


def test_claims_are_read_back_and_shown(tmp_path: Path) -> None:
    findings = [
        Claim(2, "Two <i>is</i> more").above("two against one", [1.0, 1.1, 1.2], 0, "points"),
        Claim(3, "One seed decides").above("one", [1.0], 0, "points"),
    ]
    write_claims(tmp_path, findings, title="Claims")
    read = load_findings(tmp_path)
    assert read[0] == findings[0]
    assert repr(read[1]) == repr(findings[1])  # with figures that are none
    page = build(surroundings=replace(NONE_DRAWN, findings=read))
    assert "Two &lt;i&gt;is&lt;/i&gt; more" in page
    assert "Of 2 claims tested: 1 supported, 0 refuted, 1 undecided." in page
    assert load_findings(tmp_path / "none") == []


def test_mistakes_are_the_images_that_most_miss_then_those_that_divide(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 1, 0], dtype=np.uint8)
    predicted = np.array([[0, 2, 2, 1, 0], [0, 2, 1, 1, 0], [0, 2, 2, 0, 0]], dtype=np.uint8)
    assert choose_images(predicted, labels) == ([1, 2, 3], [])
    results = make_results()
    measurement = replace(make_measurement(), confusion=[[2, 0, 0], [0, 2, 0], [0, 0, 1]])
    names = ["FFN_baseline", "FFN_PTQ_INT8", HOSTILE.replace("/", "")]
    records = []
    for name, own in zip(names, predicted, strict=True):
        logits = 5 * np.eye(3, dtype=np.float32)[own]
        file = save_predictions(tmp_path, f"{name}-seed0", logits, labels.astype(np.int64))
        records.append(replace(make_record(name, onnxruntime=measurement), predictions=file))
    pixels = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    images = TestImages(pixels, labels, {})
    results = Results(records)
    missed, divided = find_mistakes(tmp_path, results, images)
    assert [mistake.number for mistake in missed] == [1, 2, 3]
    assert not divided
    assert [(answer.name, answer.is_right, len(answer.models)) for answer in missed[1].answers] == [
        ("2", True, 2), ("1", False, 1),
    ]  # fmt: skip
    assert missed[0].source == as_png(pixels[1])
    assert "Missed by most models" in build(results, replace(NONE_DRAWN, images=images), tmp_path)
    (tmp_path / "runs" / "FFN_baseline-seed0.npz").unlink()
    assert [mistake.number for mistake in find_mistakes(tmp_path, results, None)[0]] == [1, 2, 3]


def test_png_is_one() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3), dtype=np.uint8)
    import io

    content = base64.b64decode(as_png(pixels).partition(",")[2])
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(content))), pixels)


def test_experts_get_what_the_record_says() -> None:
    images = TestImages(np.zeros((3, 2, 2), np.uint8), np.array([0, 0, 1], np.uint8), {"M": np.array([[0], [0], [1]])})
    first, second = describe_experts("M", [[1.0, 0.0], [0.0, 1.0]], [2, 1], ["zero", "one"], images)
    assert first.share == pytest.approx(2 / 3)
    assert (first.classes, len(first.sources)) == ("zero (100 %)", 2)
    assert (second.classes, len(second.sources)) == ("one (100 %)", 1)
    assert describe_experts("M", [[1.0, 0.0]], [2], ["zero"], None)[1].classes == "none"


def test_figures_become_vectors_and_one_that_fails_is_left_out() -> None:
    def good(results: Results) -> object:
        """What it shows."""
        return small_figure()

    def bad(results: Results) -> object:
        raise ValueError("no luck")

    (picture,) = draw_pictures(make_results(), {"good": good, "bad": bad, "none": lambda _: None})  # type: ignore[dict-item]
    assert picture.name == "good"
    assert picture.caption == "What it shows."
    assert base64.b64decode(picture.source.removeprefix("data:image/svg+xml;base64,")).startswith(b"<?xml")
    again = next(iter(draw_pictures(make_results(), {"good": good})))  # type: ignore[dict-item]
    assert again == picture


def test_demo_prefers_few_bits_then_other_families_then_small_files() -> None:
    sizes = {"A_INT8": 2.0, "A_INT8-x": 0.1, "B_INT8": 1.0, "C": 0.01}
    records = [
        replace(
            make_record(name, onnxruntime=make_measurement(size_mib=size)),
            family=name[:1],
            precision="INT8" if "INT8" in name else "FP32",
        )
        for name, size in sizes.items()
    ]
    assert [model.name for model in order_for_demo(Results(records).models)] == ["B_INT8", "A_INT8", "A_INT8-x", "C"]
    assert MAX_MODELS <= 12
    assert gzip.decompress(base64.b64decode(pack(b"model"))) == b"model"


def test_page_says_what_is_missing(tmp_path: Path) -> None:
    path = write_page(tmp_path, make_results(), NONE_DRAWN)
    page = path.read_text()
    assert path.name == "report.html"
    assert "No live demo in this page: not asked for." in page
    assert "<canvas" not in page
