"""Small data for all tests, and MNIST for those that need it."""

import os
from pathlib import Path

import pytest
from tiny import make_dataset

from mnist_lab.data import Dataset


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """A folder with MNIST; the test is skipped without one, unless MNIST_LAB_REQUIRE_DATA forbids that."""
    folder = os.environ.get("MNIST_LAB_DATA")
    if not folder:
        if os.environ.get("MNIST_LAB_REQUIRE_DATA"):
            pytest.fail("MNIST_LAB_REQUIRE_DATA is set, but MNIST_LAB_DATA is not")
        pytest.skip("MNIST_LAB_DATA names no folder with MNIST")
    return Path(folder)


@pytest.fixture
def toy_dataset() -> Dataset:
    """300 + 100 + 100 noisy images of ten bars."""
    return make_dataset()
