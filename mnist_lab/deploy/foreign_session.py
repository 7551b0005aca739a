"""A classifier that was made elsewhere, running in ONNX Runtime on the suite's images."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from mnist_lab.deploy.foreign import ADVICE, ForeignModel, silent_options
from mnist_lab.files import reading
from mnist_lab.measure import Array
from mnist_lab.runtimes.onnxruntime import PROVIDERS, BoundBatch, OnnxRuntimeSession, bind_batch

SMALLEST = 1e-12  # that a probability counts as


class ForeignSession:
    """From raw pixels to logits; what becomes of pixels first, and of probabilities last, stands outside the clock.

    Raises:
        UserError: ONNX Runtime cannot load or run the model, or it gives what is no finite number.
    """

    runtime = OnnxRuntimeSession.runtime
    version = OnnxRuntimeSession.version

    def __init__(self, foreign: ForeignModel, content: bytes, *, threads: int, of_probabilities: bool = False) -> None:
        self._foreign, self._of_probabilities = foreign, of_probabilities
        with self._running():
            self._session = onnxruntime.InferenceSession(content, silent_options(threads), providers=PROVIDERS)

    def _running(self) -> AbstractContextManager[None]:
        """Whatever ONNX Runtime says of the model inside becomes one line."""
        return reading(Path(f"{self._foreign.name}.onnx"), ADVICE, verdict="cannot be run")

    def prepare(self, pixels: Array) -> list[BoundBatch]:
        """All images together, or as many at a time as the model takes, the last ones again to fill up."""
        images, size = self._foreign.images.prepare(pixels), self._foreign.fixed_batch or len(pixels)
        starts = range(0, len(images), size)
        return [bind_batch(self._session, _filled(images[start : start + size], size)) for start in starts]

    def run(self, batch: list[BoundBatch]) -> list[BoundBatch]:
        for bound in batch:
            self._session.run_with_iobinding(bound.binding)
        return batch

    def predict(self, pixels: Array) -> Array:
        with self._running():
            parts = [bound.logits for bound in self.run(self.prepare(pixels))]
            scores: Array = np.concatenate(parts)[: len(pixels)]
            if not np.isfinite(scores).all():
                raise ValueError("its scores are no finite numbers")
        return np.log(np.maximum(scores, SMALLEST)) if self._of_probabilities else scores


def _filled(images: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    return images if len(images) == size else np.resize(images, (size, *images.shape[1:]))


def are_probabilities(scores: Array) -> bool:
    """Whether all scores (N, C) are of a softmax: they lie in [0, 1] and sum to 1 for each image."""
    return bool((scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-3))
