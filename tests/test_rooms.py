"""The arrows between the rooms of the package: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mnist_lab"
FOUNDATION = {"errors", "files", "folders", "machine", "measure"}
BASE = {*FOUNDATION, "memory", "progress", "sources", "data", "models", "training"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "machine": set(),
    "measure": set(),
    "memory": set(),
    "progress": set(),
    "files": {"errors"},
    "folders": {"errors", "files"},
    "idx": {"errors"},
    "sources": {"errors", "idx"},
    "own_data": {"errors", "files", "idx", "progress", "sources"},
    "data": {"errors", "own_data", "sources"},
    "models": {"data", "errors", "files"},
    "training": {"data", "errors", "measure", "models", "progress"},
    "runtimes": {*FOUNDATION, "models", "deploy.artifacts"},
    "deploy": {*FOUNDATION, "data", "models", "runtimes"},
    "compress": {*BASE, "deploy", "runtimes", "experiments.technique"},
    "report": {*FOUNDATION, "runtimes"},
    "experiments": {*BASE, "deploy", "runtimes", "compress", "report"},
    "studies": {*BASE, "deploy", "runtimes", "compress", "report", "experiments"},
    "command": {*BASE, "own_data", "runtimes", "compress", "report", "experiments"},
}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, in the form `room` or `room.module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "mnist_lab" else {module}
    return {name.removeprefix("mnist_lab.") for name in found if name.startswith("mnist_lab.")}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_room_is_known() -> None:
    assert {room_of(path) for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path) -> None:
    room = room_of(path)
    # What a technique is, and so what its file may see, is no more than this module itself imports.
    allowed = MAY_IMPORT[room] | {room}
    if path == PACKAGE / "experiments" / "technique.py":
        allowed = {*BASE, "runtimes"}
    wrong = {name for name in imports_of(path) if name not in allowed and name.partition(".")[0] not in allowed}
    assert wrong == set()


def test_no_room_stands_above_itself() -> None:
    """The allowed arrows themselves make no circle, but for the technique that rows and techniques share."""
    below = {room: {name.partition(".")[0] for name in names if "." not in name} for room, names in MAY_IMPORT.items()}
    while below:
        free = {room for room, names in below.items() if not names}
        assert free, below
        below = {room: names - free for room, names in below.items() if room not in free}


def test_nothing_imports_a_script() -> None:
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in (*FILES, *ROOT.glob("benchmarks/*.py"), *ROOT.glob("*.py")):
        names = {
            name.partition(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        assert not names & scripts, path


def test_report_and_own_data_need_no_torch() -> None:
    rooms = ("report", "own_data")
    modules = ", ".join(
        f"mnist_lab.{room}.{path.stem}" for room in rooms for path in (PACKAGE / room).glob("[a-z]*.py")
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_classes_and_image_size_are_known_to_the_data_alone() -> None:
    for path in FILES:
        numbers = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)} & {
            28,
            784,
        }
        assert not numbers or path.name == "sources.py" or path.parent.name == "claims", path  # whose numbers they are
