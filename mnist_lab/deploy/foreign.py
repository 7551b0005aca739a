"""A classifier that was made elsewhere: an ONNX file that may hold anything, checked before anything runs it.

It may be made of all standard operators, but for those that run other graphs. It takes one tensor of images and gives
scores by class; of what else it gives nothing is computed.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from mnist_lab.deploy.image_input import ImageInput, Preparation, describe_input, dims_of, format_shape
from mnist_lab.files import read_bytes, reading
from mnist_lab.measure import EVALUATION_BATCH, Array
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

MAX_FILE = 2**29  # bytes
MAX_NAME = 80  # characters
MAX_VALUES = 2**22  # of all results together, for an image
MAX_MADE = 2**27  # of all results that are made of constants alone
STANDARD = ("", "ai.onnx")
OTHER_FLOATS: dict[int, str] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
QUANTIZED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger",
    "ConvInteger",
}  # fmt: skip
REFUSED = "cannot be compared"
ADVICE = "See docs/compare.md."
PROBED = 3  # images on which a model of any batch is held against the same of a fixed one


@dataclass(frozen=True)
class ForeignModel:
    """A model of the user's, as it will be run: of one input and one output, (N, C) scores."""

    name: str  # of its file, without the ending
    model: onnx.ModelProto
    images: ImageInput
    num_classes: int
    fixed_batch: int | None  # as many images as it takes at a time, where it takes no other number
    notes: tuple[str, ...]  # what was assumed or changed, a line each

    @property
    def content(self) -> bytes:
        return self.model.SerializeToString(deterministic=True)

    @property
    def is_quantized(self) -> bool:
        """Whether there are integer products, or such as its makers had in mind, in it already."""
        return any(node.op_type in QUANTIZED for node in self.model.graph.node)


def read_foreign(
    path: Path,
    preparation: Preparation,
    *,
    image_size: tuple[int, int],
    num_classes: int,
    output: str | None = None,
) -> ForeignModel:
    """Read and check a classifier.

    Args:
        preparation: what its input is, as far as the user says so.
        image_size: height and width of the images that it will get.
        num_classes: of the scores that it must give.
        output: which of its outputs these are; when not given, the first.

    Raises:
        UserError: the file is missing or is no such classifier, or running it could do harm.
    """
    content = read_bytes(path, "no model at {}")
    with reading(path, ADVICE, verdict=REFUSED):
        if len(content) > MAX_FILE:
            raise ValueError(f"its {len(content):,} bytes are more than {MAX_FILE:,}")
        model = _parse(content)
        _check_self_contained(model)
        notes = _keep_output(model, output)
        _check_operators(model)
        images, assumed = describe_input(_only_input(model), preparation, image_size=image_size)
        fixed_batch = _fix_images(model, images)
        _check_scores(model, num_classes)
        onnx.checker.check_model(model, full_check=True)
        check_sizes(model, fixed_batch)
        if fixed_batch is not None and (freed := free_batch(model, images, fixed_batch)) is not None:
            notes.append(f"its batch of {fixed_batch} is free now, which changes none of its scores")
            model, fixed_batch = freed, None
        elif fixed_batch is not None:
            what = "one image at a time, and so it is timed" if fixed_batch == 1 else f"{fixed_batch} images at a time"
            notes.append(f"it takes {what}: its batch cannot be freed")
    return ForeignModel(_name_of(path), model, images, num_classes, fixed_batch, (*assumed, *notes))


def _name_of(path: Path) -> str:
    """As files and folders may be called."""
    return re.sub(r"[^\w+-]+", "_", path.stem)[:MAX_NAME]


def _parse(content: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_from_string(content)
    except Exception as error:
        raise ValueError("it is no ONNX file, or only part of one") from error
    if not model.graph.node or not model.opset_import:
        raise ValueError("it is no ONNX file, or an empty one")
    return model


def _check_self_contained(model: onnx.ModelProto) -> None:
    """Raise ValueError where a model points to other files, has operators of its own, or runs graphs within."""
    if model.functions:
        raise ValueError("it has functions of its own; inline them with onnx.inliner.inline_local_functions")
    if model.graph.sparse_initializer:
        raise ValueError("it has sparse constants; save it with dense ones")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type in {AttributeProto.GRAPH, AttributeProto.GRAPHS} or attribute.g.node or attribute.graphs:
                raise ValueError(f"its {node.op_type} runs a graph within, which is not supported")
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise ValueError("it has sparse constants; save it with dense ones")
    for constant in constants_of(model.graph):
        if constant.external_data or constant.data_location == TensorProto.EXTERNAL:
            raise ValueError("its weights lie in another file; make one of both with onnx.save(onnx.load(...), ...)")
        if constant.data_type in OTHER_FLOATS:
            raise ValueError(f"its weights are {OTHER_FLOATS[constant.data_type]}; export it in float32")


def constants_of(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """All tensors that a graph stores."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _keep_output(model: onnx.ModelProto, output: str | None) -> list[str]:
    """Drop whatever one output does not need; in place. Gives a line where there were several.

    Raises:
        ValueError: there is none of that name.
    """
    graph = model.graph
    names = [value.name for value in graph.output]
    if not names:
        raise ValueError("it has no output")
    if output is not None and output not in names:
        raise ValueError(f"it has no --output {output}; its outputs are {', '.join(names)}")
    chosen = output or names[0]
    needed = {chosen}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed.update(node.input)
            kept.append(node)
    constants = [constant for constant in graph.initializer if constant.name in needed]
    stored = {constant.name for constant in constants}
    inputs = [value for value in graph.input if value.name in needed - stored]  # old files list constants too
    (scores,) = (value for value in graph.output if value.name == chosen)
    rest = onnx.GraphProto(name=graph.name, node=reversed(kept), initializer=constants, input=inputs, output=[scores])
    graph.CopyFrom(rest)
    return [
        f'its scores are "{chosen}", of {len(names)} outputs' + ("" if output else "; name another with --output")
    ] * (len(names) > 1)


def _check_operators(model: onnx.ModelProto) -> None:
    """Raise ValueError unless every operator is a standard one; in place, leave out what no operator needs."""
    versions = {opset.domain: opset.version for opset in model.opset_import}
    version = next((versions[domain] for domain in STANDARD if domain in versions), None)
    others = sorted({f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in STANDARD})
    if others:
        raise ValueError(f"it has operators that are no standard ONNX: {', '.join(others)}")
    if version is None:
        raise ValueError("it does not say of which version of ONNX its operators are")
    unknown = sorted({node.op_type for node in model.graph.node if not onnx.defs.has(node.op_type)})
    if unknown:
        raise ValueError(f"it has operators that are no standard ONNX: {', '.join(unknown)}")
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", version))


def _only_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    inputs = model.graph.input
    if len(inputs) != 1:
        named = ", ".join(f"{value.name} {format_shape(dims_of(value))}" for value in inputs) or "none"
        raise ValueError(f"its inputs are {named}, where one of images is expected")
    return inputs[0]


def _fix_images(model: onnx.ModelProto, images: ImageInput) -> int | None:
    """Write the size of images into the graph's input, in place, and give the batch that is fixed there."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims[1:], images.shape, strict=True):
        dim.dim_value = size
    batch = dims[0].dim_value if dims[0].HasField("dim_value") else None
    if batch is not None and not 1 <= batch <= EVALUATION_BATCH:
        raise ValueError(f"its batch is fixed at {batch}, not between 1 and {EVALUATION_BATCH}")
    if batch is None:
        dims[0].dim_param = "N"
    return batch


def _check_scores(model: onnx.ModelProto, num_classes: int) -> None:
    """Raise ValueError where the output cannot be scores of so many classes; in place, say that it is."""
    (value,) = model.graph.output
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output[0]
    dims, tensor = dims_of(inferred), inferred.type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type else "no tensor"
        raise ValueError(f"its output {value.name} is {kind}, not float scores; name another with --output")
    if dims is not None and (len(dims) != 2 or dims[1] not in {None, num_classes}):
        raise ValueError(
            f"its output {value.name} {format_shape(dims)} is not (N, {num_classes}), a score for each of the data "
            f"set's {num_classes} classes"
        )
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [None, num_classes]))
    value.type.tensor_type.shape.dim[0].CopyFrom(batch)


def check_sizes(model: onnx.ModelProto, fixed_batch: int | None) -> None:
    """Find out how much memory a model's results take before it is run.

    Raises:
        ValueError: too much, or it cannot be told.
    """
    batch = fixed_batch or EVALUATION_BATCH
    sketch = onnx.ModelProto()
    sketch.CopyFrom(model)
    sketch.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    sketch.graph.output[0].type.tensor_type.shape.dim[0].dim_value = batch
    inferred = onnx.shape_inference.infer_shapes(sketch, strict_mode=True, data_prop=True).graph
    shapes = {value.name: dims_of(value) for value in (*inferred.value_info, *inferred.output)}
    constants = {constant.name for constant in model.graph.initializer}
    of_images = of_constants = 0
    for node in model.graph.node:
        is_constant = constants.issuperset(filter(None, node.input))
        for name in filter(None, node.output):
            shape = shapes.get(name)
            if shape is None or None in shape:
                raise ValueError(
                    f"how large {name} of its {node.op_type} gets cannot be told; export it anew (PyTorch: dynamo=True)"
                )
            size = math.prod(size for size in shape if size is not None)
            if is_constant:
                constants.add(name)
                of_constants += size
            else:
                of_images += size
    if of_images > MAX_VALUES * batch or of_constants > MAX_MADE:
        raise ValueError(
            f"its results hold {of_images // batch:,} values for an image and {of_constants:,} besides, of which "
            f"{MAX_VALUES:,} and {MAX_MADE:,} are allowed"
        )


def free_batch(model: onnx.ModelProto, images: ImageInput, fixed: int) -> onnx.ModelProto | None:
    """The same model for batches of any size; None where there is none that gives the same scores.

    Exports often fix the batch in the shapes of input and output and in those that rows are reshaped to.
    """
    freed = onnx.ModelProto()
    freed.CopyFrom(model)
    for value in (*freed.graph.input, *freed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    constants = {constant.name: constant for constant in freed.graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in freed.graph.node if node.op_type == "Constant"}
    for node in freed.graph.node:
        if node.op_type == "Reshape" and (shape := constants.get(node.input[1])) is not None:
            sizes = numpy_helper.to_array(shape).copy()
            if sizes.ndim == 1 and sizes.size and sizes[0] == fixed:
                sizes[0] = 0 if -1 in sizes else -1  # as many as there are; or as remain
                shape.CopyFrom(numpy_helper.from_array(sizes, shape.name))
                node.ClearField("attribute")  # by which 0 may mean none
    try:
        check_sizes(freed, None)
        same = _gives_the_same(model, freed, images, fixed)
    except Exception:  # whatever a library says of it: the batch stays fixed
        return None
    return freed if same else None


def _gives_the_same(model: onnx.ModelProto, freed: onnx.ModelProto, images: ImageInput, fixed: int) -> bool:
    """Whether scores of noise in one batch are those of the batches that it takes."""
    options = silent_options(1)
    one, other = (
        onnxruntime.InferenceSession(found.SerializeToString(), options, providers=PROVIDERS)
        for found in (model, freed)
    )
    noise = np.random.default_rng(0).random((PROBED * fixed, 1, *images.size), np.float32)
    pixels = images.prepare(noise)
    expected: list[Array] = [one.run(None, {images.name: part})[0] for part in np.split(pixels, PROBED)]
    (found,) = other.run(None, {images.name: pixels})
    together = np.concatenate(expected)
    return found.shape == together.shape and np.allclose(found, together, rtol=1e-3, atol=1e-4 * np.abs(together).max())


def silent_options(threads: int) -> onnxruntime.SessionOptions:
    """The suite's, without what ONNX Runtime prints besides raising it."""
    options = session_options(threads)
    options.log_severity_level = 4
    return options


def num_parameters(graph: onnx.GraphProto) -> int:
    """Of all constants that are floats."""
    return sum(math.prod(one.dims) for one in constants_of(graph) if one.data_type == TensorProto.FLOAT)


def stored_bytes(content: bytes) -> int:
    """Of all constants that a model's file stores."""
    graph = onnx.load_from_string(content).graph
    return sum(
        math.prod(one.dims) * helper.tensor_dtype_to_np_dtype(one.data_type).itemsize for one in constants_of(graph)
    )
