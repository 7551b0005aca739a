"""Copy a deployed file to hand it on, if asked for with probabilities, and write beside it what it takes and gives.

python deploy_mnist.py checkpoints/mnist-compact-standard/FFN_PTQ_INT8-seed0.onnx --output digits.onnx
python deploy_mnist.py checkpoints/mnist-compact-standard/FFN_PTQ_INT8-seed0.onnx --probabilities --output digits.onnx
"""

from dataclasses import dataclass

import tyro

from mnist_lab.command.entry import Folder, run_script
from mnist_lab.deploy.card import card_path
from mnist_lab.deploy.copy import copy_artifact


@dataclass(frozen=True)
class DeployOptions:
    model: tyro.conf.Positional[Folder]
    """The artifact (.onnx) to copy."""
    output: Folder
    """The copy; its JSON lies beside it."""
    probabilities: bool = False
    """Let it give the softmax of its logits (probabilities) and the number of the largest (class), too."""


def main(options: DeployOptions) -> None:
    card = copy_artifact(options.model, options.output, probabilities=options.probabilities)
    interface = card.interface
    height, width = interface.image_size
    print(f"to deploy: {options.output}\ndescribed in: {card_path(options.output)}")
    print(f"takes: {interface.input}, float32 (batch, 1, {height}, {width}), bytes / 255, {interface.polarity}")
    print(f"gives: {', '.join(interface.outputs)}; classes: {', '.join(interface.classes)}")
    for split, found in card.accuracy.items():
        print(f"{split} accuracy: {found['accuracy']:.2%} of {found['num_images']:,} images, in {found['runtime']}")
    if card.cpu_features is not None:
        print(f"on x86 it needs a CPU with {card.cpu_features}")
    if card.depends_on_batch:
        print("what it says of an image depends on what else is in the batch")


if __name__ == "__main__":
    run_script(main, DeployOptions, __doc__)
