"""Matrices stored sparsely where that takes fewer bytes: the values that are not zero, and where each stands.

By the ONNX standard a place is an INT64 index into the flattened matrix. A value of FP32 so takes 8 + 4 bytes, which
pays below a third of values that are not zero; one of BF16 8 + 2, below a fifth; one of INT8 8 + 1, below a ninth.
ONNX Runtime makes such matrices dense when it loads them. Vectors (biases, scales, zero points) stay dense.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from mnist_lab.deploy.safety import ITEM_BYTES, MAY_BE_SPARSE, constant_bytes, is_in_proportion

INDEX_BYTES = ITEM_BYTES[TensorProto.INT64]
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes of a value
HAS_MINUS_ZERO = {TensorProto.FLOAT, TensorProto.BFLOAT16}


def store_sparsely(graph: onnx.GraphProto) -> None:
    """Put those of a graph's matrices among its sparse constants that take fewer bytes there, indices counted."""
    dense = []
    for constant in graph.initializer:
        places = _places(constant) if _is_matrix(constant) else None
        if places is not None and _pays(constant, len(places)):
            graph.sparse_initializer.append(_to_sparse(constant, places))
        else:
            dense.append(constant)
    del graph.initializer[:]
    graph.initializer.extend(dense)


def make_dense(graph: onnx.GraphProto) -> None:
    """Put a graph's sparse constants, which must have been checked, among the others, all in the order of their use.

    That is the order in which `deploy/onnx.py` writes them. A graph without sparse ones stays as it is.
    """
    if not graph.sparse_initializer:
        return
    graph.initializer.extend(_to_dense(sparse) for sparse in graph.sparse_initializer)
    del graph.sparse_initializer[:]
    used = dict.fromkeys(name for node in graph.node for name in node.input)
    place = {name: number for number, name in enumerate(used)}
    graph.initializer.sort(key=lambda constant: place.get(constant.name, len(place)))


def graph_bytes(graph: onnx.GraphProto) -> int:
    """Bytes of all constants as a graph stores them; of sparse ones those of values and indices."""
    dense = sum(constant_bytes(constant) for constant in graph.initializer)
    sparse = graph.sparse_initializer
    return dense + sum(constant_bytes(one.values) + constant_bytes(one.indices) for one in sparse)


def bytes_by_form(graph: onnx.GraphProto) -> dict[str, int]:
    """What a graph's matrices would take in each form, by their numbers of values and of those that are not zero.

    Rounding to INT8 adds to the zeros, which is not foreseen here.
    """
    found = _matrices(graph)
    num_values, num_nonzero = sum(matrix.num_values for matrix in found), sum(matrix.num_nonzero for matrix in found)
    forms = {}
    for precision, value_bytes in (("FP32", 4), ("INT8", 1)):
        forms[f"dense {precision}"] = num_values * value_bytes
        forms[f"sparse {precision}"] = num_nonzero * (INDEX_BYTES + value_bytes)
    return forms


def describe_storage(graph: onnx.GraphProto) -> str:
    """How a graph, as it is written, stores its matrices, and why so, in a line."""
    found = _matrices(graph)
    sparse = [matrix for matrix in found if matrix.is_sparse]
    counted = sparse or found
    share = sum(matrix.num_nonzero for matrix in counted) / sum(matrix.num_values for matrix in counted)
    dense_mb = sum(matrix.dense_bytes for matrix in found) / 1e6
    if not sparse:
        sparse_mb = sum(matrix.sparse_bytes for matrix in found) / 1e6
        return (
            f"dense, {dense_mb:.3g} MB: {share:.1%} of the values with an index of {INDEX_BYTES} bytes each "
            f"would take {sparse_mb:.3g} MB"
        )
    stored_mb = sum(matrix.sparse_bytes if matrix.is_sparse else matrix.dense_bytes for matrix in found) / 1e6
    return (
        f"{len(sparse)} of {len(found)} matrices sparse: {share:.1%} of their values with an index of {INDEX_BYTES} "
        f"bytes each, {stored_mb:.3g} MB in all; dense {dense_mb:.3g} MB"
    )


class _Matrix(NamedTuple):
    num_values: int
    num_nonzero: int
    value_bytes: int
    is_sparse: bool

    @property
    def dense_bytes(self) -> int:
        return self.num_values * self.value_bytes

    @property
    def sparse_bytes(self) -> int:
        return self.num_nonzero * (INDEX_BYTES + self.value_bytes)


def _matrices(graph: onnx.GraphProto) -> list[_Matrix]:
    dense = [
        _Matrix(math.prod(constant.dims), len(_places(constant)), ITEM_BYTES[constant.data_type], is_sparse=False)
        for constant in graph.initializer
        if _is_matrix(constant)
    ]
    return dense + [
        _Matrix(
            math.prod(constant.dims),
            math.prod(constant.values.dims),
            ITEM_BYTES[constant.values.data_type],
            is_sparse=True,
        )
        for constant in graph.sparse_initializer
    ]


def _is_matrix(constant: onnx.TensorProto) -> bool:
    return constant.data_type in MAY_BE_SPARSE and len(constant.dims) > 1


def _bits(constant: onnx.TensorProto) -> npt.NDArray[Any]:
    """The values as they are stored, flat."""
    return np.frombuffer(constant.raw_data, BITS[ITEM_BYTES[constant.data_type]])


def _places(constant: onnx.TensorProto) -> npt.NDArray[np.int64]:
    """Of the values that are not zero; nor a zero with a minus, as masks leave them."""
    bits = _bits(constant)
    return np.flatnonzero(bits << 1 if constant.data_type in HAS_MINUS_ZERO else bits).astype(np.int64)


def _pays(matrix: onnx.TensorProto, num_nonzero: int) -> bool:
    as_sparse = num_nonzero * (INDEX_BYTES + ITEM_BYTES[matrix.data_type])
    return as_sparse < constant_bytes(matrix) and is_in_proportion(matrix.dims, num_nonzero)


def _to_sparse(matrix: onnx.TensorProto, places: npt.NDArray[np.int64]) -> onnx.SparseTensorProto:
    stored, values = [len(places)], _bits(matrix)[places].tobytes()
    return onnx.SparseTensorProto(
        values=TensorProto(name=matrix.name, data_type=matrix.data_type, dims=stored, raw_data=values),
        indices=TensorProto(data_type=TensorProto.INT64, dims=stored, raw_data=places.tobytes()),
        dims=matrix.dims,
    )


def _to_dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values = sparse.values
    bits = np.zeros(math.prod(sparse.dims), BITS[ITEM_BYTES[values.data_type]])
    bits[np.frombuffer(sparse.indices.raw_data, np.int64)] = _bits(values)
    return TensorProto(name=values.name, data_type=values.data_type, dims=sparse.dims, raw_data=bits.tobytes())
