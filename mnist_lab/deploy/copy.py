"""A copy of an artifact to hand on: with probabilities and class beside the logits, where asked for, and its card.

probabilities = softmax(logits), class = the place of the largest logit; both in float, whatever the products are in.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from mnist_lab.deploy.artifacts import is_packed, read_artifact, read_onnx, read_onnx_metadata, save_onnx
from mnist_lab.deploy.card import Card, Origin, card_path, describe, save_card
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.files import sha256, write_atomically
from mnist_lab.measure import Array, log_softmax
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

PROBABILITIES, CLASS = "probabilities", "class"
CHECKED_IMAGES = 100
TOLERANCE = 1e-6


def copy_artifact(artifact: Path, output: Path, *, probabilities: bool) -> Card:
    """Write a copy and its card, and see that it computes what it should before it takes its place.

    Raises:
        UserError: the artifact is none, or lies where the copy should, or has probabilities already.
        RunFailed: the copy cannot be written, or computes something else.
    """
    if output.suffix != ".onnx":
        raise UserError(f"{output} must be the name of a file that ends in .onnx")
    if card_path(output).resolve() == card_path(artifact).resolve():
        raise UserError(f"{output} is the artifact itself: name another file")
    card = describe(artifact)
    model, says = read_onnx(artifact), read_onnx_metadata(artifact)
    if probabilities:
        if len(model.graph.output) > 1:
            raise UserError(f"{artifact} gives probabilities already")
        _add_probabilities(model.graph)
    outputs = tuple(value.name for value in model.graph.output)

    def write(temporary: Path) -> None:
        save_onnx(model, temporary, says, packed=is_packed(artifact))
        _check(artifact, temporary, card)

    write_atomically(output, write)
    original = Origin(model=card.model, file=artifact.name, sha256=card.sha256)
    card = replace(
        card,
        file=output.name,
        sha256=sha256(output),
        interface=replace(card.interface, outputs=outputs),
        parents={**card.parents, "copied": original},
    )
    save_card(output, card)
    return card


def _add_probabilities(graph: onnx.GraphProto) -> None:
    logits = graph.output[0]
    batch, classes = (dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim)
    graph.node.append(helper.make_node("Softmax", [logits.name], [PROBABILITIES], axis=-1))
    graph.node.append(helper.make_node("ArgMax", [logits.name], [CLASS], axis=-1, keepdims=0))
    graph.output.append(helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, [batch, classes]))
    graph.output.append(helper.make_tensor_value_info(CLASS, TensorProto.INT64, [batch]))


def _check(artifact: Path, copy: Path, card: Card) -> None:
    """Raise RunFailed unless a copy gives an artifact's logits, and what follows from them, on random pixels."""
    pixels = np.random.default_rng(0).random((CHECKED_IMAGES, 1, *card.interface.image_size), np.float32)
    (expected,), found = _run(artifact, pixels)[:1], _run(copy, pixels)
    is_right = np.array_equal(found[0], expected)
    if len(found) > 1:
        is_right &= bool(np.abs(found[1] - np.exp(log_softmax(expected))).max() <= TOLERANCE)
        is_right &= np.array_equal(found[2], expected.argmax(axis=1))
    if not is_right:
        raise RunFailed(f"the copy of {artifact} does not compute what that does")


def _run(artifact: Path, pixels: Array) -> list[Array]:
    session = onnxruntime.InferenceSession(read_artifact(artifact), session_options(1), providers=PROVIDERS)
    found: list[Array] = session.run(None, {"pixels": pixels})
    return found
