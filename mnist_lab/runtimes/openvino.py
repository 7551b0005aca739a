"""OpenVINO on the CPU."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino

from mnist_lab.deploy.artifacts import read_onnx
from mnist_lab.errors import WrongPrecision
from mnist_lab.files import reading
from mnist_lab.machine import package_version
from mnist_lab.measure import Array
from mnist_lab.runtimes import FLOAT_PRODUCTS, Precision

# What the runtime calls the precision of a product's input.
EXECUTED: dict[Precision, set[str]] = {"FP32": {"f32"}, "BF16": {"bf16"}, "INT8": {"u8", "i8"}}


class BoundRequest(NamedTuple):
    """A request that reads its pixels in place."""

    request: openvino.InferRequest
    pixels: Array  # kept alive for the request


class OpenVINOSession:
    """An ONNX artifact from raw pixels to logits.

    Raises:
        UserError: the file is missing, damaged, or not one of this suite's.
        WrongPrecision: a layer runs in another precision than asked for.
    """

    runtime = "openvino"
    version = package_version("openvino")

    def __init__(self, artifact: Path, *, precision: Precision, threads: int) -> None:
        options = {
            # Left alone, it would run FP32 models in BF16 where the CPU can.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "BF16" else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        content = read_onnx(artifact).SerializeToString()  # it cannot read sparse constants
        with reading(artifact):
            self._model = compile_onnx(content, options)
        products = executed_products(self._model)
        wrong = {name: executed for name, executed in products.items() if executed not in EXECUTED[precision]}
        if precision == "INT8":
            wrong = {name: executed for name, executed in wrong.items() if name not in FLOAT_PRODUCTS}
        if wrong:
            raise WrongPrecision(f"OpenVINO does not run this model in {precision}: {wrong}")

    def prepare(self, pixels: Array) -> BoundRequest:
        return bind_request(self._model, pixels)

    def run(self, batch: BoundRequest) -> openvino.InferRequest:
        batch.request.infer()
        return batch.request

    def predict(self, pixels: Array) -> Array:
        logits: Array = self.run(self.prepare(pixels)).get_output_tensor(0).data.copy()
        return logits


def bind_request(model: openvino.CompiledModel, pixels: Array) -> BoundRequest:
    """Pixels, bound to a request that has run once: the first call at a batch size compiles."""
    pixels = np.ascontiguousarray(pixels)
    request = model.create_infer_request()
    request.set_input_tensor(openvino.Tensor(pixels, shared_memory=True))
    request.infer()
    return BoundRequest(request, pixels)


def compile_onnx(content: bytes, options: Mapping[str, str | float]) -> openvino.CompiledModel:
    """An ONNX file's content, compiled for this CPU."""
    return _core().compile_model(_core().read_model(content), "CPU", dict(options))


@functools.cache
def _core() -> openvino.Core:
    """One for the process: a second one, when it goes, leaves the first one's freed stack to the signal handlers."""
    return openvino.Core()


def executed_products(model: openvino.CompiledModel) -> dict[str, str]:
    """Every matrix product of a compiled model and the precision that it runs in."""
    operators = model.get_runtime_model().get_ops()
    info_of = {operator.get_friendly_name(): operator.get_rt_info() for operator in operators}
    return {
        name.partition("/")[0]: info["runtimePrecision"].value
        for name, info in info_of.items()
        if info["layerType"].value in {"FullyConnected", "MatMul"}
    }
