"""Pipelines: a chain of rows, written as text.

    moe > experts keep=2 > neurons 0.5 teacher=self > distil self > qat 4

Links are separated by ">". A link is a name, the value of its main setting where that is not the default, and
`key=value` for any other: the fields of its dataclasses, as on the command line. The first link may name the trained
model to start from, or the shape of a small one; otherwise that is the MoE. docs/pipelines.md lists them all.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from mnist_lab.compress.adapters import AdaptLowRank, FinetuneAll
from mnist_lab.compress.bfloat16 import BFloat16
from mnist_lab.compress.distill import Distil
from mnist_lab.compress.int8 import DynamicInt8, StaticInt8
from mnist_lab.compress.levels import RouterBits
from mnist_lab.compress.merge_experts import MergeExperts
from mnist_lab.compress.mixed_bits import MixedBits
from mnist_lab.compress.prune_experts import PruneExperts, check_experts, check_keep
from mnist_lab.compress.prune_neurons import PruneNeurons
from mnist_lab.compress.prune_router import PruneRouter
from mnist_lab.compress.prune_weights import PruneWeights
from mnist_lab.compress.qat import TrainQuantized
from mnist_lab.compress.qmoe import FusedExperts
from mnist_lab.compress.refine import Refine
from mnist_lab.compress.share_base import ShareBase
from mnist_lab.compress.weight_only import WeightOnly
from mnist_lab.errors import UserError
from mnist_lab.experiments import rows
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.technique import Form, Step
from mnist_lab.models import ModelConfig
from mnist_lab.models.moe import RoutingConfig, SparseMoEConfig
from mnist_lab.models.small import SmallShape, parse_shape

LONGEST_NAME = 150  # of a row: its files add seed, departures from the recipe and an ending, and stay below 200
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """What a link's name stands for."""

    technique: type[Step] | type[Form]
    row: Callable[[Row, Any], Row]  # of the row that it starts from, and its technique
    main: str = ""  # the setting whose value needs no key
    fixed: Settings = field(default_factory=dict)  # what the name itself says


@dataclass(frozen=True)
class Choice:
    """A name that stands for one of several kinds."""

    main: str  # the setting that says which
    kinds: Mapping[str, Kind]  # the first one when it is left out


def _small(teacher: Row, step: Distil) -> Row:
    if not isinstance(step.shape, SmallShape):
        raise UserError("it needs a shape, as small w8x5s2-w16x3s2-h32")
    return rows.small_student(step.shape, teacher, step.distillation)


LINKS: dict[str, Kind | Choice] = {
    "weights": Kind(PruneWeights, rows.pruned_weights, "ratio"),
    "neurons": Kind(PruneNeurons, rows.pruned_neurons, "ratio"),
    "router": Kind(PruneRouter, lambda source, step: rows.pruned_router(step, source), "ratio"),
    "experts": Kind(PruneExperts, lambda source, step: rows.pruned_experts(step, source), "keep"),
    "merge": Kind(MergeExperts, lambda source, step: rows.merged_experts(step, source), "keep"),
    "share": Kind(ShareBase, lambda source, step: rows.shared_base(step, source), "rank"),
    "small": Kind(Distil, _small, "shape"),
    "distil": Choice(
        "teacher",
        {
            "self": Kind(Refine, lambda source, step: rows.refined(source, rows.original_of(source), step)),
            "moe": Kind(Refine, lambda source, step: rows.refined(source, rows.MOE, step)),
            "ffn": Kind(Refine, lambda source, step: rows.refined(source, rows.FFN, step)),
        },
    ),
    "qat": Kind(TrainQuantized, rows.trained_quantized, "bits", {"learn": "task"}),
    "layers": Kind(TrainQuantized, rows.trained_quantized, "bits", {"learn": "layers"}),
    "round": Kind(WeightOnly, rows.weight_only, "bits"),
    "mixed": Kind(MixedBits, rows.mixed_bits),
    "int8": Choice(
        "mode",
        {
            "static": Kind(StaticInt8, rows.static_int8),
            "dynamic": Kind(DynamicInt8, lambda source, _: rows.dynamic_int8(source)),
        },
    ),
    "fused": Kind(FusedExperts, rows.fused_experts, "bits"),
    "bf16": Kind(BFloat16, lambda source, _: rows.bfloat16(source)),
}


@dataclass(frozen=True)
class Chain:
    """The rows so far, and what is known of the last one's architecture before anything is trained."""

    rows: tuple[Row, ...]
    num_experts: int  # 1: a dense model
    has_base: bool = False  # which its experts share
    has_widths: bool = False  # its experts may each have their own

    @property
    def last(self) -> Row:
        return self.rows[-1]


def chain_from(row: Row, config: ModelConfig) -> Chain:
    """A chain that begins with a trained row of this architecture."""
    if not isinstance(config, SparseMoEConfig):
        return Chain((row,), num_experts=1)
    has_base, has_widths = config.shared_rank is not None, config.expert_widths is not None
    return Chain((row,), config.routing.num_experts, has_base=has_base, has_widths=has_widths)


def parse_pipeline(text: str) -> tuple[Row, ...]:
    """The rows of a pipeline: the trained model that it starts from, and one for each link, each the next one's source.

    What learned in few bits is deployed in them where it is the last.

    Raises:
        UserError: there is no such link or setting, or a link cannot follow the one before; the message names it.
    """
    links = [" ".join(link.split()) for link in text.split(">")]
    start = _starts_from(links[0])
    first = start or rows.MOE
    chain = Chain((first,), RoutingConfig().num_experts if first == rows.MOE else 1)
    own = list(enumerate(links, start=1))[start is not None :]
    if not any(link for _, link in own):
        raise UserError(f'--pipeline "{text}" has no link; there are {", ".join(LINKS)}')
    for number, link in own:
        with _naming(number, link):
            chain = _append(chain, link)
    if isinstance(chain.last.step, TrainQuantized):
        chain = replace(chain, rows=(*chain.rows, rows.deployed(chain.last)))
    try:
        check_name(chain.last)
    except UserError as error:
        raise UserError(f'--pipeline "{text}" is too long: {error}') from error
    return chain.rows


def check_name(row: Row) -> None:
    """Raise UserError where a row's name is too long for a file's."""
    if len(row.name) > LONGEST_NAME:
        raise UserError(f"its last row would be called {row.name}, and files bear that name")


def _starts_from(link: str) -> Row | None:
    """The row that a first link names; None where it names a technique."""
    if link in rows.SOURCES:
        return rows.SOURCES[link]
    if not re.match(r"(pool|w|h)\d", link):
        return None
    with _naming(1, link):
        return rows.small_from_scratch(parse_shape(link))


def parse_pipelines(texts: tuple[str, ...]) -> tuple[Row, ...]:
    """The rows of all pipelines, each once, after the baseline and the MoE."""
    chains = [parse_pipeline(text) for text in texts]
    return tuple(dict.fromkeys([rows.FFN, rows.MOE, *(row for chain in chains for row in _with_teachers(chain))]))


def _with_teachers(chain: tuple[Row, ...]) -> Iterator[Row]:
    for row in chain:
        if row.teacher is not None:
            yield row.teacher
        yield row


@contextmanager
def _naming(number: int, link: str) -> Iterator[None]:
    """Say in errors which link they are of."""
    try:
        yield
    except UserError as error:
        raise UserError(f'link {number}, "{link}": {error}') from error


def _append(chain: Chain, link: str) -> Chain:
    kind, settings = _read(link)
    technique = _build(kind.technique, {**settings, **kind.fixed})
    return replace(advance(chain, technique), rows=(*chain.rows, kind.row(chain.last, technique)))


def _read(link: str) -> tuple[Kind, dict[str, Any]]:
    """The kind of a link, and the settings that it is given, each of its type."""
    if not link:
        raise UserError(f"it is empty; there are {', '.join(LINKS)}")
    name, *words = link.split()
    if name in rows.SOURCES:
        raise UserError(f"{name} is a model to start from: it comes first, alone")
    if name not in LINKS:
        raise UserError(f"there is no link {name}; there are {', '.join(LINKS)}")
    found = LINKS[name]
    given = _split(words, found.main)
    if isinstance(found, Choice):
        which = given.pop(found.main, next(iter(found.kinds)))
        if which not in found.kinds:
            raise UserError(f"--{found.main} {which} must be {_listed(found.kinds)}")
        found = found.kinds[which]
    types = dict(_settings_of(found))
    settings = {}
    for key, value in given.items():
        if key not in types:
            raise UserError(f"there is no setting {_option(key)}; there are {', '.join(map(_option, types)) or 'none'}")
        settings[key] = _convert(key, value, types[key])
    return found, settings


def _split(words: list[str], main: str) -> dict[str, str]:
    """Values by the fields' names."""
    given: dict[str, str] = {}
    for place, word in enumerate(words):
        key, equals, value = word.partition("=")
        if not equals:
            key, value = main, word
            if place or not main:
                raise UserError(f"{word} is no key=value")
        key = key.replace("-", "_")
        if key in given:
            raise UserError(f"{_option(key)} is given twice")
        given[key] = value
    return given


def _settings_of(kind: Kind, within: type | None = None) -> Iterator[tuple[str, Any]]:
    """The fields that show in a row's name, down through nested dataclasses, and their types."""
    technique = within or kind.technique
    types = get_type_hints(technique)
    for one in dataclasses.fields(technique):
        if dataclasses.is_dataclass(types[one.name]):
            yield from _settings_of(kind, types[one.name])
        elif one.name == kind.main or (one.metadata.get("tag", one.name) is not None and one.name not in kind.fixed):
            yield one.name, types[one.name]


def _build(technique: type, settings: Settings) -> Any:
    """A dataclass with these fields, its own or those of nested ones."""
    types = get_type_hints(technique)
    given: dict[str, Any] = {}
    for one in dataclasses.fields(technique):
        if dataclasses.is_dataclass(types[one.name]):
            given[one.name] = _build(types[one.name], settings)
        elif one.name in settings:
            given[one.name] = settings[one.name]
    return technique(**given)


def _convert(key: str, text: str, kind: Any) -> Any:
    if text == "none" and NoneType in get_args(kind):
        return None
    if SmallShape in get_args(kind):
        return parse_shape(text)
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        raise UserError(f"--{_option(key)} {text} must be {_listed(dict.fromkeys(_allowed(kind)))}") from error


def _allowed(kind: Any) -> Iterator[str]:
    """What a type takes, in words."""
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif get_args(kind):
        for one in get_args(kind):
            yield from _allowed(one)
    else:
        yield {int: "a whole number", float: "a number", NoneType: "none"}[kind]


def _listed(names: Mapping[str, Any]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _option(key: str) -> str:
    return key.replace("_", "-")


def _check_order(chain: Chain, technique: Step | Form) -> None:
    """Raise UserError where a technique cannot come after the last row."""
    if chain.last.step is None:
        raise UserError(f"nothing can follow a form, and the link before makes {chain.last.form.precision} files")
    if isinstance(chain.last.step, TrainQuantized) and not hasattr(technique, "make"):
        raise UserError("what learned in few bits is deployed in those, and in no other form: leave one of the two out")


def advance(chain: Chain, technique: Step | Form) -> Chain:
    """What is known of the model that a technique makes of the last one.

    Raises:
        UserError: it cannot be applied to that.
    """
    _check_order(chain, technique)
    match technique:
        case Distil():
            return replace(chain, num_experts=1, has_base=False, has_widths=False)
        case PruneExperts():
            _check_mixture(chain)
            check_experts(chain.num_experts, technique.pruning)
            return _with_experts(chain, technique.pruning.keep)
        case MergeExperts():
            _check_mixture(chain)
            _check_one_width(chain)
            check_keep(technique.merging.keep, chain.num_experts)
            return _with_experts(chain, technique.merging.keep)
        case ShareBase():
            _check_mixture(chain)
            _check_no_base(chain)
            _check_one_width(chain)
            return replace(chain, has_base=True)
        case AdaptLowRank() | FinetuneAll():
            _check_no_base(chain)
            _check_one_width(chain)
        case PruneNeurons():
            _check_no_base(chain)
            is_apart = technique.pruning.widths == "apart" and chain.num_experts > 1
            return replace(chain, has_widths=chain.has_widths or is_apart)
        case PruneWeights():
            _check_no_base(chain)
            if technique.pruning.allocation != "even" and chain.num_experts == 1:
                raise UserError(f"--allocation {technique.pruning.allocation} shares out among experts: there are none")
        case PruneRouter():
            _check_mixture(chain)
        case TrainQuantized():
            _check_no_base(chain)
            _check_router_bits(chain, technique.quantization.router_bits)
            if technique.quantization.rounding.bits == 1:  # with which units of zeros would be none
                _check_one_width(chain)
        case FusedExperts():
            _check_mixture(chain)
            _check_no_base(chain)
        case WeightOnly() | MixedBits():
            _check_router_bits(chain, technique.method.router_bits)
    return chain


def _with_experts(chain: Chain, num: int) -> Chain:
    """A dense model has neither base nor widths of its own."""
    return replace(chain, num_experts=num, has_base=chain.has_base and num > 1, has_widths=chain.has_widths and num > 1)


def _check_mixture(chain: Chain) -> None:
    if chain.num_experts == 1:
        raise UserError("it takes a mixture, and the model before it has no experts")


def _check_no_base(chain: Chain) -> None:
    if chain.has_base:
        raise UserError("the experts before it share a base, which it cannot keep")


def _check_one_width(chain: Chain) -> None:
    if chain.has_widths:
        raise UserError("it takes experts of one width: give neurons, before it, widths=alike")


def _check_router_bits(chain: Chain, bits: RouterBits) -> None:
    if bits is not None and chain.num_experts == 1:
        raise UserError(f"--router-bits {bits}: the model before it has no router")
