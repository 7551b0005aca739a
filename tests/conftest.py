"""Small data for all tests, and MNIST for those that need it."""

import os
from pathlib import Path

import pytest
import torch

from mnist_lab.data import Dataset, Split


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
    """300 + 100 + 100 noisy images of ten bars: learnable in a second."""
    generator = torch.Generator().manual_seed(0)

    def draw(num_images: int) -> Split:
        labels = torch.randint(0, 10, (num_images,), generator=generator)
        pixels = 0.3 * torch.rand(num_images, 1, 28, 28, generator=generator)
        pixels[torch.arange(num_images), 0, 4 + 2 * labels] += 0.7
        return Split(pixels, labels)

    test = draw(100)
    return Dataset("digits", draw(300), draw(100), mean=0.18, std=0.18, load_test=lambda: test)
