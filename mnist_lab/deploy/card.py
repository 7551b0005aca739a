"""What a deployed file takes, gives and assumes. No torch here.

The file's own metadata says what is known when it is written; but for small students, which spare every byte. A small
JSON file beside it says that too, and what was measured of exactly this file, for readers without the suite.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from mnist_lab.deploy.artifacts import INTERFACE, read_onnx, read_onnx_metadata
from mnist_lab.files import BLANK, check_seal, read_bytes, reading, seal, sha256, write_atomically
from mnist_lab.machine import VNNI

Polarity = Literal["light-on-dark", "dark-on-light"]  # as in data.py, which imports torch
CENTRED = {"mnist", "qmnist", "digits"}  # data sets whose digits fill 5/7 of a side and are centred by their mass
PREPARATIONS = {
    True: "one digit: cropped to its ink, 5/7 of a side, centred by mass, from 0 to full (mnist_lab/deploy/images.py)",
    False: "the whole image, resized",
}
MOST_WITHOUT_VNNI = 64  # of a weight: 255·(64 + 64) is below 2¹⁵, all that two products may come to


@dataclass(frozen=True)
class Interface:
    """What goes in and comes out."""

    classes: tuple[str, ...]  # in the order of the logits
    image_size: tuple[int, int]  # height, width
    polarity: Polarity  # what shows, and its ground
    input: str = "pixels"
    dtype: str = "float32"
    axes: tuple[str, ...] = ("batch", "1", "height", "width")
    range: tuple[int, int] = (0, 1)
    bytes_are_divided_by: int = 255
    outputs: tuple[str, ...] = ("logits",)


class Origin(TypedDict):
    """A file that another was made from."""

    model: str
    file: str
    sha256: str


class Accuracy(TypedDict):
    """Share of a split's images whose class is right, and where that was measured."""

    accuracy: float
    num_images: int
    runtime: str


@dataclass(frozen=True)
class Card:
    """All that is known of a deployed file."""

    file: str
    sha256: str
    interface: Interface
    preparation: str  # of images, before they are like those that it was trained on
    cpu_features: str | None  # that 8-bit weights need of an x86 CPU, or sums would overflow; None: any will do
    depends_on_batch: bool  # whether an image's logits depend on what else is in the batch
    model: str = ""
    technique: str = ""
    precision: str = ""
    dataset: str = ""
    preset: str = ""
    recipe: str = ""
    seed: int | None = None
    accuracy: dict[str, Accuracy] = field(default_factory=dict)  # by split; "test, one by one": a batch an image
    parents: dict[str, Origin] = field(default_factory=dict)  # by role


def card_path(artifact: Path) -> Path:
    """Where the card of an artifact lies."""
    return artifact.with_suffix(".json")


def save_card(artifact: Path, card: Card) -> None:
    """Write the card beside its artifact, unless it lies there as it is.

    Raises:
        UserError: what lies there is no file.
        RunFailed: the folder cannot be written.
    """
    path = card_path(artifact)
    encoded = msgspec.json.format(msgspec.json.encode({"digest": BLANK} | asdict(card)), indent=1)
    content = seal(encoded + b"\n")
    if not path.exists() or read_bytes(path) != content:
        write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_card(artifact: Path) -> Card | None:
    """What was saved beside an artifact; None where there is nothing, or it is of another file.

    Raises:
        UserError: it is damaged, or was edited.
    """
    path = card_path(artifact)
    card = read_card(path) if path.exists() else None
    return card if card is not None and card.sha256 == sha256(artifact) else None


def read_card(path: Path) -> Card:
    """What a card says, whatever it is of.

    Raises:
        UserError: it is missing, damaged, or was edited.
    """
    content = read_bytes(path)
    with reading(path, "Delete it."):
        check_seal(content)
        return msgspec.json.decode(content, type=Card)


def describe(artifact: Path) -> Card:
    """What is known of an artifact: all that its card says, else what the file itself does.

    Classes without names go by their numbers.

    Raises:
        UserError: as `read_artifact` and `load_card`.
    """
    says, graph = read_onnx_metadata(artifact), read_onnx(artifact).graph
    card = load_card(artifact)
    with reading(artifact):
        card = card or _card_of(artifact, says, graph)
        if card.interface.image_size != _image_size(graph) or len(card.interface.classes) != _num_classes(graph):
            raise ValueError("what is said of its classes and image size does not fit it")
    return card


def _card_of(artifact: Path, says: Mapping[str, Any], graph: onnx.GraphProto) -> Card:
    """What a file itself says."""
    numbers = tuple(map(str, range(_num_classes(graph))))
    said = {name: says[name] for name in ("model", "dataset", "preset", "recipe", "seed", "parents") if name in says}
    facts = {
        "file": artifact.name,
        "sha256": sha256(artifact),
        "interface": says.get(INTERFACE, asdict(Interface(numbers, _image_size(graph), "light-on-dark"))),
        "preparation": PREPARATIONS[says.get("dataset") in CENTRED],
        "cpu_features": features_needed(graph),
        "depends_on_batch": depends_on_batch(graph),
    }
    return msgspec.convert(said | facts, Card)


def _image_size(graph: onnx.GraphProto) -> tuple[int, int]:
    height, width = (dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim[2:])
    return height, width


def _num_classes(graph: onnx.GraphProto) -> int:
    return graph.output[0].type.tensor_type.shape.dim[1].dim_value


def features_needed(graph: onnx.GraphProto) -> str | None:
    """What an x86 CPU must have for a graph's integer products to be right; None for nothing.

    Without VNNI two products of an unsigned byte and a signed one are added in 16 bits, which saturate.

    Args:
        graph: with dense constants, as `read_onnx` gives it.
    """
    largest = max((int(np.abs(weight.astype(np.int16)).max()) for weight in _integer_weights(graph)), default=0)
    return " or ".join(VNNI) if largest > MOST_WITHOUT_VNNI else None


def _integer_weights(graph: onnx.GraphProto) -> Iterator[npt.NDArray[np.int8]]:
    """The signed bytes that are multiplied with rounded activations."""
    weights = {constant.name: constant for constant in graph.initializer if constant.data_type == TensorProto.INT8}
    dequantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            name = node.input[1]
        elif node.op_type in {"Gemm", "MatMul", "Conv"} and dequantized.keys() >= {*node.input[:2]}:
            name = dequantized[node.input[1]]
        else:
            continue
        if name in weights:
            yield numpy_helper.to_array(weights[name])


def depends_on_batch(graph: onnx.GraphProto) -> bool:
    """Whether scales are taken from all images of a batch together."""
    return any(node.op_type == "DynamicQuantizeLinear" for node in graph.node)
