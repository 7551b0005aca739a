"""Say what image files show, by a deployed model: a line an image, with the class and how probable it is.

python classify.py photo.jpg scan.png --model checkpoints/mnist-compact-standard/FFN_PTQ_INT8-seed0.onnx
"""

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import tyro

from mnist_lab.command.entry import Folder, run_script
from mnist_lab.deploy.card import CENTRED, describe
from mnist_lab.deploy.images import prepare
from mnist_lab.errors import UserError
from mnist_lab.measure import log_softmax
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession


@dataclass(frozen=True)
class ClassifyOptions:
    images: tyro.conf.Positional[tuple[Folder, ...]]
    """Image files, one thing each: photographed, scanned or drawn, of any size, dark on light or light on dark."""
    model: Folder
    """The artifact (.onnx); its classes have the names that the JSON beside it says."""
    as_is: bool = False
    """Neither crop, centre nor invert: the images are like those that the model was trained on already."""

    def __post_init__(self) -> None:
        if not self.images:
            raise UserError("name at least one image file")


def main(options: ClassifyOptions) -> None:
    card, session = describe(options.model), OnnxRuntimeSession(options.model, threads=1)
    interface, failed = card.interface, 0
    take = partial(
        prepare,
        image_size=interface.image_size,
        polarity=interface.polarity,
        is_centred=card.dataset in CENTRED,
        as_is=options.as_is,
    )
    for path in options.images:
        try:
            pixels = take(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        (probabilities,) = np.exp(log_softmax(session.predict(pixels)))
        best = int(probabilities.argmax())
        print(f"{path}: class {interface.classes[best]} ({100 * probabilities[best]:.1f} %)", flush=True)
    if failed:
        raise UserError(f"{failed} of {len(options.images)} images could not be read")


if __name__ == "__main__":
    run_script(main, ClassifyOptions, __doc__)
