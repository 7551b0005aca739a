"""The page in a browser: headless Chromium, from a file, without a network."""

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from builders import make_measurement, make_record
from test_figures import small_figure
from tiny import make_lab

from mnist_lab.command.report import write_report
from mnist_lab.data import load_dataset
from mnist_lab.experiments.make import load_or_make
from mnist_lab.experiments.rows import FFN, MOE, ORDER, dynamic_int8, static_int8
from mnist_lab.experiments.run import Run
from mnist_lab.report.drawing import Figure
from mnist_lab.report.page import Surroundings, write_page
from mnist_lab.report.page_images import TestImages
from mnist_lab.report.records import Record, load_predictions
from mnist_lab.report.results import Results
from mnist_lab.runtimes.onnxruntime_web import fetch_runtime

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = {"width": 375, "height": 812}
NAMES = (
    "FFN_baseline",
    "FFN_PTQ_INT8",
    "Sparse_MoE_with_a_name_that_is_much_longer_than_a_phone_is_wide_and_then_some",
)
Open = Callable[..., "Page"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: "Browser") -> Iterator[Open]:
    """Opens a file, and holds at the end that the console was silent and nothing was asked of a network."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_file(path: Path, **settings: Any) -> "Page":
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert said == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three models without a demo."""
    folder = tmp_path_factory.mktemp("plain")
    accuracies, sizes = (0.9, 0.8, 0.7), (10.0, 9.0, 1.0)
    records = [
        make_record(name, onnxruntime=make_measurement(accuracy, size))
        for name, accuracy, size in zip(NAMES, accuracies, sizes, strict=True)
    ]

    def wide(results: Results) -> Figure:
        """Nothing, on much room."""
        figure = small_figure("x")
        figure.set_size_inches(12, 4)
        return figure

    return write_page(
        folder, Results(records), Surroundings(figures={"wide": wide}, commands=["python run " + 40 * "-x "])
    )


def names_in_order(page: "Page") -> list[str]:
    return page.locator("#table-comparison tbody th:visible").all_inner_texts()


def test_tables_sort_as_numbers_by_mouse_and_keyboard(plain: Path, open_page: Open) -> None:
    page = open_page(plain)
    points = page.locator("#table-comparison thead th", has=page.get_by_text("acc vs baseline", exact=True))
    points.get_by_role("button").click()
    assert points.get_attribute("aria-sort") == "ascending"
    assert names_in_order(page) == [NAMES[2], NAMES[1], NAMES[0]]  # -20, -10, 0
    page.keyboard.press("Enter")
    assert points.get_attribute("aria-sort") == "descending"
    assert names_in_order(page) == [NAMES[0], NAMES[1], NAMES[2]]
    assert page.locator("#table-comparison [aria-sort=descending]").count() == 1
    page.get_by_label("Rows that contain").fill("ptq")
    assert names_in_order(page) == [NAMES[1]]
    assert page.locator("#filtered").inner_text() == "1 of 3 rows"


def test_page_fits_a_phone(plain: Path, open_page: Open) -> None:
    page = open_page(plain, viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    for details in page.locator("details").all():
        details.evaluate("own => own.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def ground_of(page: "Page") -> int:
    """How light the ground is, 0 to 255."""
    red = re.search(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert red is not None
    return int(red[0])


def test_page_is_dark_where_the_system_is_or_the_reader_says(plain: Path, open_page: Open) -> None:
    assert ground_of(open_page(plain, color_scheme="light")) > 200
    page = open_page(plain, color_scheme="dark")
    assert ground_of(page) < 50
    toggle = page.get_by_role("button", name="Theme")
    toggle.click()
    assert (toggle.inner_text(), ground_of(page) > 200) == ("Theme: light", True)
    page.reload()
    assert ground_of(page) > 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast_enough(plain: Path, open_page: Open, scheme: str) -> None:
    """4.5 to 1 (WCAG 2, AA), of each text with a colour of its own against the ground it stands on."""
    page = open_page(plain, color_scheme=scheme)
    colors = page.evaluate("""() => {
        const ground = (own) => {
            const color = getComputedStyle(own).backgroundColor;
            return color === "rgba(0, 0, 0, 0)" && own.parentElement ? ground(own.parentElement) : color;
        };
        const texts = [...document.querySelectorAll("main *, header *")].filter((own) =>
            [...own.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim()));
        return texts.map((own) => [getComputedStyle(own).color, ground(own)]);
    }""")
    assert len({tuple(pair) for pair in colors}) > 3
    for pair in colors:
        light, dark = sorted((luminance(color) for color in pair), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair


def luminance(color: str) -> float:
    channels = np.array([int(value) for value in re.findall(r"\d+", color)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_keyboard_and_reader_find_their_way(plain: Path, open_page: Open) -> None:
    page = open_page(plain)
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.locator(":focus").get_attribute("id") == "main"
    for landmark in ("banner", "navigation", "main"):
        assert page.get_by_role(landmark).count() == 1
    assert page.locator("h1").count() == 1
    assert page.locator("img:not([alt])").count() == 0
    assert "Nothing, on much room." in (page.locator("figure img").get_attribute("alt") or "")
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(own => Number(own.tagName[1]))")
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    nameless = "[...document.querySelectorAll('button, input')].filter(own => !own.textContent && !own.labels?.length)"
    assert page.evaluate(f"{nameless}.length") == 0


def test_tables_can_be_copied(plain: Path, open_page: Open) -> None:
    page = open_page(plain, permissions=["clipboard-read", "clipboard-write"])
    page.locator("#table-columns .copies summary").click()
    page.get_by_role("button", name="Copy LaTeX of columns").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith(r"\begin{tabular}")


def test_page_prints(plain: Path, open_page: Open) -> None:
    assert open_page(plain).pdf().startswith(b"%PDF")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """A page of four models of the bundled digits, with a demo, and their records."""
    if reason := fetch_runtime():
        pytest.skip(f"no engine for browsers: {reason}")
    dataset = load_dataset("digits")
    lab = make_lab(tmp_path_factory.mktemp("lab"), dataset=dataset)
    rows = (FFN, static_int8(FFN), MOE, dynamic_int8(MOE))
    records = [load_or_make(Run(lab, row, 0)) for row in rows]
    return write_report(lab.results, Results(records, ORDER), lab.checkpoints, dataset.load_test), records


def answers(page: "Page") -> list[str]:
    return page.locator(".says").all_inner_texts()


def test_demo_says_of_test_images_what_the_artifacts_say(trained: tuple[Path, list[Record]], open_page: Open) -> None:
    from playwright.sync_api import expect

    path, records = trained
    page = open_page(path)
    page.locator("#draw").scroll_into_view_if_needed()
    page.get_by_text("Ready: draw.").wait_for()
    shown = [name.partition("\n")[0] for name in page.locator("tr[data-model] th").all_inner_texts()]
    records = [record for record in records if record.model in shown]
    assert {"FFN_PTQ_INT8", "Sparse_MoE_INT8"} <= {record.model for record in records}
    labels = load_predictions(path.parent, records[0]).labels
    for digit in range(10):
        page.locator(".examples button").nth(digit).press("Enter")
        index = int(np.flatnonzero(labels == digit)[0])
        expected = [str(load_predictions(path.parent, record).predicted[index]) for record in records]
        expect(page.locator(".says")).to_have_text(expected)
    experts = page.locator("tr", has_text="Sparse_MoE_INT8").locator(".expert").all_inner_texts()
    assert len(experts) == 2
    assert sum(int(re.findall(r"\d+", expert)[1]) for expert in experts) in {99, 100, 101}


def test_demo_makes_of_a_drawing_what_mnist_is_made_of(trained: tuple[Path, list[Record]], open_page: Open) -> None:
    page = open_page(trained[0], viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    canvas = page.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 30, box["y"] + 20)  # a one, small and in a corner
    page.mouse.down()
    page.mouse.move(box["x"] + 34, box["y"] + 90, steps=5)
    page.mouse.up()
    page.get_by_text(re.compile(r"[0-9] say [0-9]")).wait_for()
    assert all(answers(page))
    seen = page.evaluate("""() => {
        const canvas = document.getElementById("seen");
        return [...canvas.getContext("2d").getImageData(0, 0, 28, 28).data].filter((_, place) => place % 4 === 0);
    }""")
    pixels = np.array(seen, dtype=float).reshape(28, 28)
    rows, _ = np.nonzero(pixels)
    assert rows.max() - rows.min() == 19
    centre = [np.average(np.arange(28), weights=pixels.sum(axis=axis)) for axis in (0, 1)]
    assert centre == pytest.approx([13.5, 13.5], abs=0.6)
    page.get_by_role("button", name="Clear").click()
    assert set(answers(page)) == {""}


def test_page_of_letters_is_not_centred(plain: Path, tmp_path: Path, open_page: Open) -> None:
    records = [replace(make_record(), dataset="fashion-mnist")]
    images = TestImages(np.zeros((1, 2, 2), np.uint8), np.zeros(1, np.uint8), {})
    page = open_page(write_page(tmp_path, Results(records), Surroundings(images=images, figures={})))
    assert page.get_by_role("heading", name="Draw an image").count() == 1
