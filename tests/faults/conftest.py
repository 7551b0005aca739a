"""What the whole suite leaves when it is let alone, for all tests here."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# So that the tests here share modules, and those of the tests above.
sys.path[:0] = [str(Path(__file__).parents[1])]

from faults.scripts import LOAD, fork_script, preload  # noqa: E402


@pytest.fixture(scope="module")
def finished() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        preload()
        started = fork_script("run_all_experiments", LOAD, Path(folder), Path(folder) / "log")
        assert started.wait(300) == 0, started.log.read_text()[-2000:]
        yield Path(folder)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path
