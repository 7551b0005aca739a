"""Files made to do harm: no code runs, no other file is read, no memory is taken without measure, nothing hangs."""

import ast
import os
import pickle
import random
import re
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save

from faults.scripts import LOAD, QUICK, ROOT, fork_script
from faults.test_damage import FILES, IS_LONG, SEED, Kind, damage, kinds  # noqa: F401  a fixture
from mnist_lab.deploy.artifacts import read_artifact, read_onnx
from mnist_lab.deploy.safety import check_graph
from mnist_lab.errors import UserError
from mnist_lab.files import BLANK, DIGEST, seal
from mnist_lab.models.checkpoints import FORMAT, read_tensors

NAME = "digits-compact-quick"
# What runs code that it reads, or reads what it is told to.
FORBIDDEN = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "eval", "exec", "compile", "allow_pickle"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "torch.export.load", "torch.jit.load", "yaml.load"}
ALLOWED = {
    ("mnist_lab/runtimes/pytorch.py", "torch.compile"),
    ("mnist_lab/report/records.py", "allow_pickle"),  # =False
}


@pytest.mark.parametrize(
    "path", [*(ROOT / "mnist_lab").rglob("*.py"), *ROOT.glob("*.py")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_module_reads_what_could_run_code(path: Path) -> None:
    assert {(str(path.relative_to(ROOT)), name) for name in found_in(path.read_text())} <= ALLOWED


def found_in(source: str) -> set[str]:
    """What of the forbidden a module imports or calls, under whatever name."""
    found = set()
    names: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            room = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names |= {alias.asname or alias.name: room + alias.name for alias in node.names}
            found |= {name.partition(".")[0] for name in names.values()} & FORBIDDEN
            found |= {*names.values()} & FORBIDDEN_CALLS
        elif isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            called = names.get(first, first) + dot + rest
            found |= {called} & (FORBIDDEN | FORBIDDEN_CALLS)
            found |= {k.arg for k in node.keywords if k.arg in FORBIDDEN and ast.unparse(k.value) != "False"}
            if called == "numpy.load" and len(node.args) > 1:  # the third is allow_pickle
                found.add("allow_pickle")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(x)", "import torch as t\nt.load(x)", "from torch import load\nload(x)",
        "from torch import load as read", "from torch.export import load", "import pickle as p",
        "from pickle import loads",
        "import numpy as np\nnp.load(x, None, True)", "import numpy\nnumpy.load(x, allow_pickle=True)", "eval(x)",
    ],
)  # fmt: skip
def test_scan_sees_it_under_any_name(source: str) -> None:
    assert found_in(source)
    assert not found_in("import numpy as np\nnp.load(x, allow_pickle=False)\nimport json\njson.load(x)")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, (str(self.marker),))


def run(script: str, arguments: list[str], folder: Path) -> tuple[int | None, str]:
    started = fork_script(script, arguments, folder, folder / "log")
    try:
        return started.wait(120), started.log.read_text(errors="replace")
    finally:
        started.end()


def test_planted_programs_are_never_run(folder: Path) -> None:
    """In every place and under every name of a file that is read, and where such files used to lie."""
    checkpoints, runs, marker = folder / "checkpoints" / NAME, folder / "results" / NAME / "runs", folder / "marker"
    pickled = pickle.dumps(Bomb(marker))
    torch.save(Bomb(marker), folder / "bomb.pt")
    zipped = (folder / "bomb.pt").read_bytes()
    np.savez(folder / "bomb.npz", probabilities=np.array([Bomb(marker)], object), predicted=1, labels=1)
    arrays = (folder / "bomb.npz").read_bytes()
    for path in list(checkpoints.glob("*-seed0.*")):
        for extension in (".pt2", ".pt", ".pkl", ".fit1.safetensors"):
            path.with_suffix(extension).write_bytes(pickled if extension == ".pkl" else zipped)
    num_victims = 3 if IS_LONG else 1
    artifacts, own = sorted(checkpoints.glob("*.onnx")), sorted(checkpoints.glob("*seed0.safetensors"))
    for victim in [*artifacts[:num_victims], *own[:num_victims]]:
        whole = victim.read_bytes()
        for content in (pickled, zipped):
            victim.write_bytes(content)
            code, log = run("run_all_experiments", LOAD, folder)
            assert (code, "Traceback" in log) == (2, False), log
        victim.write_bytes(whole)
    for victim in sorted(runs.glob("*.npz"))[:2]:
        victim.write_bytes(arrays)
    code, log = run("run_all_experiments", LOAD, folder)
    assert code == 0, log
    assert not marker.exists()


KINDS = ["pipe", "folder", "endless device", "dangling link", "link to itself"][: 5 if IS_LONG else 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("victim", ["FFN_baseline*.safetensors", "FFN_baseline*.onnx", "FFN_baseline*.json"])
def test_what_is_no_file_ends_in_one_line_at_once(folder: Path, kind: str, victim: str) -> None:
    path = next(folder.rglob(victim))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to(folder / "nowhere")
    else:
        path.symlink_to(path)
    for script, arguments in (("run_all_experiments", LOAD), ("ptq_mnist", [*QUICK])):
        code, log = run(script, arguments, folder)
        assert code in {0, 1, 2}, log
        assert "Traceback" not in log
        if code:
            assert log.splitlines()[-1].startswith(("error: ", "failed: ")), log
    if kind in {"pipe", "endless device", "folder"}:
        assert code == 2 or victim.endswith("json")


def values(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def sizes(name: str, *numbers: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def bomb(*nodes: onnx.NodeProto, constants: list[onnx.TensorProto] = []) -> onnx.ModelProto:  # noqa: B006
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 1, 28, 28])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])
    return helper.make_model(helper.make_graph([*nodes], "bomb", [pixels], [logits], constants))


def node(operator: str, inputs: list[str], output: str = "logits", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], name=output, **attributes)


def flat() -> onnx.NodeProto:
    return node("Flatten", ["pixels"], "x0")


def doubled(times: int = 25) -> list[onnx.NodeProto]:
    return [node("Concat", [f"x{n}", f"x{n}"], f"x{n + 1}", axis=1) for n in range(times)]


def split_and_doubled() -> list[onnx.NodeProto]:
    halves = helper.make_node("Split", ["x0", "s"], ["x1", "y"], name="halves")
    return [halves, node("Concat", ["x1", "x1"], "x2"), node("Concat", ["x2", "y"])]


def squared(*, by: str) -> list[onnx.NodeProto]:
    """Each value of a batch times each other."""
    return [node("Reshape", ["x0", "c"], "x1"), node("Reshape", ["x0", "r"], "x2"), node(by, ["x1", "x2"])]


def counted(start: int, step: int) -> onnx.ModelProto:
    return bomb(
        node("Shape", ["pixels"], "shape"), node("Squeeze", ["shape"], "end"), node("Range", ["a", "end", "c"]),
        constants=[numpy_helper.from_array(np.array(value), name) for name, value in (("a", start), ("c", step))],
    )  # fmt: skip


def put_outside(constant: onnx.TensorProto) -> None:
    constant.ClearField("raw_data")
    constant.data_location = TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="/etc/passwd")


def outside() -> onnx.TensorProto:
    constant = values("w", 4)
    put_outside(constant)
    return constant


def lying() -> onnx.TensorProto:
    constant = values("w", 4)
    constant.dims[0] = 10**12
    return constant


def not_a_number() -> onnx.TensorProto:
    return numpy_helper.from_array(np.array([np.nan], np.float32), "w")


Change = Callable[[onnx.SparseTensorProto], object]


def sparse(change: Change = lambda _: None) -> onnx.ModelProto:
    """A sound graph but for the change: a matrix (784, 20) with a hundred ones, one in every tenth place."""
    places = numpy_helper.from_array(10 * np.arange(100))
    matrix = onnx.SparseTensorProto(values=values("w", 100), indices=places, dims=[784, 20])
    change(matrix)
    model = bomb(flat(), node("MatMul", ["x0", "w"]))
    model.graph.sparse_initializer.append(matrix)
    return model


def places(array: Any) -> Change:
    return lambda matrix: matrix.indices.CopyFrom(numpy_helper.from_array(np.asarray(array)))


def stored(array: Any) -> Change:
    return lambda matrix: matrix.values.CopyFrom(numpy_helper.from_array(np.asarray(array), "w"))


def shaped(*dims: int) -> Change:
    return lambda matrix: matrix.CopyFrom(
        onnx.SparseTensorProto(values=matrix.values, indices=matrix.indices, dims=dims)
    )


def few(matrix: onnx.SparseTensorProto, num: int = 40) -> None:
    stored(np.ones(num, np.float32))(matrix)
    places(np.arange(num))(matrix)


def more_places(matrix: onnx.SparseTensorProto) -> None:
    places(np.arange(200))(matrix)
    matrix.indices.dims[:] = [100]


def twice() -> onnx.ModelProto:
    model = sparse()
    model.graph.initializer.append(values("w", 784, 20))
    return model


def as_wide_as_it_claims() -> onnx.ModelProto:
    """One number per image times a hundred values that stand for a hundred thousand."""
    model = sparse(shaped(320, 320))
    del model.graph.node[:]
    number = [flat(), node("MatMul", ["x0", "v"], "x1"), node("Reshape", ["x1", "c"], "x2")]  # (B, 1, 1)
    model.graph.node.extend([*number, node("Mul", ["x2", "w"])])
    model.graph.initializer.extend([values("v", 784, 1), sizes("c", -1, 1, 1)])
    return model


def fused(change: Callable[[onnx.ModelProto], object] = lambda _: None) -> onnx.ModelProto:
    """A sound graph but for the change: four experts 32 -> 64 -> 32 as one operator, two of them an image."""
    constants = [values("v", 784, 32), values("g", 32, 4), values("u", 32, 10)]
    weights = []
    for inputs, outputs in ((32, 64), (64, 32)):
        bytes_ = numpy_helper.from_array(np.zeros((4, outputs, inputs), np.uint8), f"q{inputs}")
        weights += [bytes_, values(f"s{inputs}", 4, outputs, inputs // 32), values(f"b{inputs}", 4, outputs)]
    operator = node(
        "QMoE", ["x1", "x2", *(weight.name for weight in weights)], "x3", domain="com.microsoft", k=2,
        activation_type="relu", normalize_routing_weights=1, expert_weight_bits=8, block_size=32, accuracy_level=4,
    )  # fmt: skip
    layers = [node("MatMul", ["x0", "v"], "x1"), node("MatMul", ["x1", "g"], "x2")]
    model = bomb(flat(), *layers, operator, node("MatMul", ["x3", "u"]), constants=[*constants, *weights])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    change(model)
    return model


def operator_of(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == "x3")


def told(**settings: Any) -> Callable[[onnx.ModelProto], object]:
    """The operator with these settings."""

    def change(model: onnx.ModelProto) -> None:
        attributes = operator_of(model).attribute
        others = [attribute for attribute in attributes if attribute.name not in settings]
        del attributes[:]
        attributes.extend([*others, *(helper.make_attribute(name, value) for name, value in settings.items())])

    return change


def given(place: int, name: str) -> Callable[[onnx.ModelProto], object]:
    """The operator with another input."""

    def change(model: onnx.ModelProto) -> None:
        inputs = operator_of(model).input
        inputs.extend([""] * (place + 1 - len(inputs)))
        inputs[place] = name

    return change


def holding(constant: onnx.TensorProto) -> Callable[[onnx.ModelProto], object]:
    """The graph with another constant in place of that of its name."""
    return lambda model: next(own for own in model.graph.initializer if own.name == constant.name).CopyFrom(constant)


def computed(model: onnx.ModelProto) -> None:
    """Weights that are made of a constant, not a constant."""
    model.graph.node.insert(0, node("Cast", ["q32"], "made", to=TensorProto.UINT8))
    operator_of(model).input[2] = "made"


def of_two_bits(model: onnx.ModelProto) -> None:
    """What the vendor's operator takes too, stored as it has to be."""
    told(expert_weight_bits=2)(model)
    for inputs, outputs in ((32, 64), (64, 32)):
        bytes_ = np.zeros((4, outputs, inputs // 4), np.uint8)
        holding(numpy_helper.from_array(bytes_, f"q{inputs}"))(model)


def named(operator: str) -> Callable[[onnx.ModelProto], object]:
    return lambda model: setattr(operator_of(model), "op_type", operator)


def imported(*domains: tuple[str, int]) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        del model.opset_import[1:]
        model.opset_import.extend(helper.make_opsetid(*own) for own in domains)

    return change


FUSED: dict[str, Callable[[onnx.ModelProto], object]] = {
    "another of that vendor's": named("MoE"),
    "another of that vendor's, by a standard name": named("Relu"),
    "of another domain": lambda model: setattr(operator_of(model), "domain", "com.other"),
    "of no domain": lambda model: setattr(operator_of(model), "domain", ""),
    "domain not named": imported(),
    "domain of another version": imported(("com.microsoft", 2)),
    "a domain more": imported(("com.microsoft", 1), ("com.other", 1)),
    "computed weights": computed,
    "weights of the images": given(2, "x1"),
    "scales of the images": given(3, "x1"),
    "weights of no name": given(5, ""),
    "wider weights": holding(numpy_helper.from_array(np.zeros((4, 64, 64), np.uint8), "q32")),
    "fewer scales": holding(values("s64", 4, 32, 1)),
    "fewer biases": holding(values("b64", 2, 32)),
    "more experts than the router": holding(values("g", 32, 3)),
    "rows of another width": holding(values("v", 784, 64)),
    "more experts an image than there are": told(k=5),
    "experts an image without end": told(k=10**15),
    "no experts an image": told(k=0),
    "other bits": told(expert_weight_bits=4),
    "of two bits": of_two_bits,
    "no bits": told(expert_weight_bits=0),
    "other groups": told(block_size=16),
    "no groups": told(block_size=0),
    "other activation": told(activation_type="swiglu"),
    "a setting more": told(swiglu_fusion=1),
    "zero points": given(11, "b32"),
    "weights of experts of another shape": given(14, "x1"),
}


def test_one_operator_of_a_vendor_is_read() -> None:
    check_graph(fused())
    check_graph(fused(given(14, "x2")))
    for other in ("MoE", "MatMulNBits", "Relu"):
        with pytest.raises(ValueError, match=f"the operator {other}, which the suite does not write"):
            check_graph(fused(named(other)))


def test_sparse_constant_is_read() -> None:
    check_graph(sparse())


SPARSE: dict[str, Change] = {
    "places of 32 bits": places(10 * np.arange(100, dtype=np.int32)),
    "places by row and column": places(np.stack([np.arange(100), np.arange(100) % 20], axis=1)),
    "fewer places than values": places(10 * np.arange(99)),
    "more places than they say": more_places,
    "places from high to low": places(10 * np.arange(100)[::-1]),
    "a place twice": places([0, *range(99)]),
    "place before the first": places(np.arange(-1, 99)),
    "place behind the last": places([*range(99), 784 * 20]),
    "places outside": lambda matrix: put_outside(matrix.indices),
    "values outside": lambda matrix: put_outside(matrix.values),
    "values that lie of their shape": lambda matrix: matrix.values.CopyFrom(lying()),
    "values that are no numbers": stored(np.full(100, np.nan, np.float32)),
    "values of 64 bits": stored(np.ones(100, np.int64)),
    "values in two dimensions": stored(np.ones((10, 10), np.float32)),
    "values for a huge shape": shaped(10**9, 10**9),
    "few values for a long side": few,
    "no shape": shaped(),
    "a negative shape": shaped(-784, -20),
    "an empty shape": shaped(0, 20),
    "no values": partial(few, num=0),
}
GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "expand of a constant": lambda: bomb(node("Expand", ["w", "s"]), constants=[values("w", 1), sizes("s", 10**10)]),
    "expand of the input": lambda: bomb(node("Expand", ["pixels", "s"]), constants=[sizes("s", 10**6, 1, 28, 28)]),
    "range": lambda: bomb(node("Range", ["a", "b", "c"]), constants=[sizes("a", 0), sizes("b", 10**12), sizes("c", 1)]),
    "outer product": lambda: bomb(node("Mul", ["w", "v"]), constants=[values("w", 10**5, 1), values("v", 1, 10**5)]),
    "constants with an input left out": lambda: bomb(
        node("Gemm", ["w", "v", ""]), constants=[values("w", 10**4, 1), values("v", 1, 10**4)]
    ),
    "range from far below": lambda: counted(-(10**12), 1),
    "joined with itself": lambda: bomb(flat(), *doubled()),
    "a part joined twice": lambda: bomb(flat(), *split_and_doubled(), constants=[sizes("s", 1, 1)]),
    "every value by every other": lambda: bomb(
        flat(), *squared(by="Mul"), constants=[sizes("c", -1, 1), sizes("r", 1, -1), values("w", 1000)]
    ),
    "product of all": lambda: bomb(
        flat(), *squared(by="MatMul"), constants=[sizes("c", -1, 1), sizes("r", 1, -1), values("w", 1000)]
    ),
    "constant of shape": lambda: bomb(node("ConstantOfShape", ["s"]), constants=[sizes("s", 10**10)]),
    "tile": lambda: bomb(node("Tile", ["pixels", "s"]), constants=[sizes("s", 10**9, 1, 1, 1)]),
    "outside": lambda: bomb(node("Add", ["pixels", "w"]), constants=[outside()]),
    "lying shape": lambda: bomb(node("Add", ["pixels", "w"]), constants=[lying()]),
    "not a number": lambda: bomb(node("Add", ["pixels", "w"]), constants=[not_a_number()]),
    "loop": lambda: bomb(node("Loop", ["", "pixels"])),
    "own domain": lambda: bomb(node("Relu", ["pixels"], domain="com.microsoft")),
    "other output": lambda: bomb(node("Relu", ["pixels"], "other")),
    "two constants of one name": twice,
    "result as wide as a sparse constant claims to be": as_wide_as_it_claims,
    **{f"fused: {name}": partial(fused, change) for name, change in FUSED.items()},
    **{f"sparse: {name}": partial(sparse, change) for name, change in SPARSE.items()},
}


def save_bomb(model: onnx.ModelProto, path: Path) -> None:
    model.metadata_props.add(key="digest", value=f'"{BLANK}"')
    path.write_bytes(seal(model.SerializeToString()))


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_that_could_do_harm_is_refused(tmp_path: Path, name: str) -> None:
    model = GRAPHS[name]()
    if name == "other output":
        model.graph.output[0].name = "other"
    path = tmp_path / "x.onnx"
    save_bomb(model, path)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_artifact, read_onnx):
        with pytest.raises(UserError, match=r"x.onnx is broken") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200 * 1024


HEADERS = {
    "longer than the file": (2**60).to_bytes(8, "little") + b"{}",
    "of another size": (2**31).to_bytes(8, "little") + b"{}" * 10,
    "nested": (200_000).to_bytes(8, "little") + b"[" * 100_000 + b"]" * 100_000,
    "without metadata": save({"x": torch.ones(3)}),
    "with a digest elsewhere": save({"x": torch.ones(3)}, metadata={"format": f'"{FORMAT}"', "architecture": "{}"}),
    "with numbers": save({"x": torch.ones(3)}, metadata={"format": "12"}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(seal(HEADERS[name] + BLANK.encode()))
    with pytest.raises(UserError, match=r"x.safetensors is broken"):
        read_tensors(path)


SEALED = ["checkpoint", "sparse artifact", "MoE INT8 artifact", "record", "training state", "dark knowledge"]


@pytest.mark.parametrize("name", SEALED)
def test_damage_with_a_digest_of_its_own_is_read_or_refused(kinds: dict[str, Kind], name: str) -> None:  # noqa: F811
    """One who knows how to seal a file can change a weight, but neither stop a script otherwise nor take its memory."""
    path, readers = kinds[name]
    whole, generator = path.read_bytes(), random.Random(f"{SEED} {name}")
    header = whole if path.suffix != ".safetensors" else whole[: 8 + int.from_bytes(whole[:8], "little")]
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for number in range(FILES):
            damaged = damage(header, generator)[0] + whole[len(header) :]
            blank = DIGEST.sub(BLANK.encode(), damaged, count=1)
            if len(re.findall(BLANK.encode(), blank)) != 1:
                continue
            path.write_bytes(seal(blank))
            try:
                readers[number % len(readers)](path)
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017
    finally:
        path.write_bytes(whole)
    took_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert took_kib < 2 * len(whole) / 1024 + 200 * 1024
