"""Whatever bytes the readers and whatever words the command line are given: an answer, or the user's error."""

import contextlib
import importlib
import io
import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from test_scripts import OPTIONS

from faults.test_damage import FILES
from faults.test_hostile import bomb, flat, node, save_bomb, values
from mnist_lab.command.entry import REGISTRY
from mnist_lab.deploy.artifacts import read_artifact, read_onnx
from mnist_lab.deploy.card import read_card
from mnist_lab.errors import UserError
from mnist_lab.files import BLANK, seal
from mnist_lab.idx import UINT8, find_idx
from mnist_lab.models import config_from_dict
from mnist_lab.models.checkpoints import load_checkpoint, read_tensors
from mnist_lab.own_data.images import decode
from mnist_lab.own_data.table import read_table
from mnist_lab.report.records import load_record
from mnist_lab.studies.claims.settle import load_scaling
from mnist_lab.studies.dark_knowledge import load_dark_knowledge

READERS: dict[str, Callable[[Path], object]] = {
    "safetensors": read_tensors,
    "checkpoint": load_checkpoint,
    "artifact": read_artifact,
    "record": load_record,
    "card": read_card,
    "dark knowledge": lambda path: load_dark_knowledge(path, "mnist"),
    "scaling": load_scaling,
    "idx": lambda path: find_idx(path, dtype=UINT8).read(5),
    "image": lambda path: decode(path.read_bytes(), path),
    "csv": lambda path: read_table(path, None),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["schema", "seed"]), inner),
)
SETTINGS = settings(max_examples=FILES, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", READERS)
@SETTINGS
@given(content=st.binary(max_size=300), is_sealed=st.booleans())
def test_any_bytes(name: str, content: bytes, is_sealed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(seal(content + BLANK.encode()) if is_sealed else content)
        with contextlib.suppress(UserError):
            READERS[name](path)


@pytest.mark.parametrize("name", ["record", "card", "dark knowledge", "scaling"])
@SETTINGS
@given(value=st.dictionaries(st.text(), JSON))
def test_any_json(name: str, value: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        content = json.dumps(value | {"schema": 4, "digest": BLANK}).encode(errors="replace")
        path.write_bytes(seal(content) if content.count(BLANK.encode()) == 1 else content)
        with contextlib.suppress(UserError):
            READERS[name](path)


@SETTINGS
@given(fields=st.dictionaries(st.sampled_from(["kind", "widths", "data", "routing", "head_widths"]), JSON))
def test_any_architecture(fields: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError):
        config_from_dict(fields)


WHOLE = st.integers(0, 99) | st.integers(-(2**63), 2**63 - 1)


@SETTINGS
@given(
    places=st.sets(st.integers(0, 99), min_size=1).map(sorted) | st.lists(WHOLE),
    num_values=st.none() | st.integers(0, 99),
    dims=st.sampled_from([[7, 13], [3, 5, 9], [2000]]) | st.lists(WHOLE, max_size=3),
    kind=st.sampled_from([TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT64]),
)
def test_any_sparse_constant(places: list[int], num_values: int | None, dims: list[int], kind: int) -> None:
    """It is refused in one line, or stands for no more than a thousand values for each that it stores."""
    stored = np.ones(len(places) if num_values is None else num_values, np.float32 if kind == 1 else np.int8)
    matrix = onnx.SparseTensorProto(indices=numpy_helper.from_array(np.array(places, np.int64)), dims=dims)
    matrix.values.CopyFrom(numpy_helper.from_array(stored, "w"))
    matrix.values.data_type = kind
    model = bomb(flat(), node("MatMul", ["x0", "v"]), constants=[values("v", 784, 10)])
    model.graph.sparse_initializer.append(matrix)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.onnx"
        save_bomb(model, path)
        try:
            (dense,) = (constant for constant in read_onnx(path).graph.initializer if constant.name == "w")
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            return
    found = numpy_helper.to_array(dense)
    assert found.shape == tuple(dims)
    assert found.size <= 1024 * len(stored)
    assert np.flatnonzero(found).tolist() == places


OPTION = st.sampled_from(
    ["seed", "epochs", "dataset", "top-k", "balance", "alpha", "runtime", "seeds", "mode", "gate", "wait", "results"]
)
WORD = st.text(string.printable) | st.integers().map(str) | st.floats().map(str) | st.text()
WORDS = st.lists(OPTION.map("--{}".format) | OPTION.map("--no-{}".format) | WORD, max_size=6)


@pytest.mark.parametrize("script", OPTIONS)
@SETTINGS
@given(words=WORDS)
def test_any_words_on_the_command_line(script: str, words: list[str]) -> None:
    options = getattr(importlib.import_module(script), OPTIONS[script])
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            tyro.cli(options, args=words, config=config, registry=REGISTRY)
        except SystemExit as error:
            assert error.code in {0, 2}  # noqa: PT017
        except UserError:
            pass
