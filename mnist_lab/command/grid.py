"""The grid of a sweep: options that take lists, and the rows and settings that every combination of them names."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from tyro.constructors import PrimitiveConstructorSpec

from mnist_lab.command.options import MAX_RUN_SEEDS, NUM_SEEDS
from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.errors import UserError
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import FFN, sparse_moe, student
from mnist_lab.models import PresetName
from mnist_lab.models.moe import Balance, Gate, RoutingConfig
from mnist_lab.training import RecipeName

T = TypeVar("T")
ModelName = Literal["moe", "ffn", "student"]
TeacherName = Literal["moe", "ffn"]
Answer = Literal["yes", "no"]
MAX_ROWS = 10_000  # of a sweep, over all seeds
ROUTING, SOFTENING = ([setting.name for setting in fields(config)] for config in (RoutingConfig, DistillationConfig))
# What a row of each model depends on; everything depends on what is in OF_ALL.
OF_MODEL: dict[ModelName, list[str]] = {"moe": ROUTING, "ffn": [], "student": ["teacher", *ROUTING, *SOFTENING]}
OF_ALL = ("preset", "recipe", "epochs", "batch_size", "learning_rate")


def _list_of(parse: Callable[[str], Sequence[Any]], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """Of parts between commas, each of which may stand for several values; each value counts once."""

    def parse_all(given: list[str]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(itertools.chain.from_iterable(parse(part.strip()) for part in given[0].split(","))))

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{metavar},...",
        instance_from_str=parse_all,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(map(str, values)) or "the usual one"],
    )


def _one_of(names: Any) -> PrimitiveConstructorSpec[Any]:
    """A list of a Literal's values."""
    choices = get_args(names)

    def parse(part: str) -> list[str]:
        if part not in choices:
            raise ValueError(f"'{part}' is none of {', '.join(choices)}")
        return [part]

    return _list_of(parse, f"{{{'|'.join(choices)}}}")


def _parse_seeds(part: str) -> range:
    """`3`, or `0-4` for five of them."""
    first, dash, last = part.partition("-")
    seeds = range(int(first), int(last if dash else first) + 1)
    if not seeds:
        raise ValueError(f"'{part}' ends before it begins")
    if seeds.start < 0 or seeds.stop > NUM_SEEDS:
        raise ValueError(f"'{part}' must lie between 0 and {NUM_SEEDS - 1}")
    if len(seeds) > MAX_RUN_SEEDS:
        raise ValueError(f"'{part}' are more than {MAX_RUN_SEEDS:,} seeds")
    return seeds


Ints = Annotated[tuple[int, ...], _list_of(lambda part: [int(part)], "INT")]
Floats = Annotated[tuple[float, ...], _list_of(lambda part: [float(part)], "FLOAT")]


class Rows(NamedTuple):
    """What a grid comes to: its rows, each with those of its settings that were given, and what cannot be."""

    settings: dict[Row, dict[str, Any]]
    left_out: list[str]


@dataclass(frozen=True)
class Grid:
    """What is varied: every option takes a list, with commas between, and every combination is a row."""

    model: Annotated[tuple[ModelName, ...], _one_of(ModelName)] = ("moe",)
    """The mixture of experts, the dense baseline, or a small FFN that one of them teaches."""
    seeds: Annotated[tuple[int, ...], _list_of(_parse_seeds, "SEED|FIRST-LAST")] = (0,)
    """Seeds of initial weights, batches, augmentation and router noise: 0-4, or 0,2,5-7."""
    preset: Annotated[tuple[PresetName, ...], _one_of(PresetName)] = ("compact",)
    """Sets of architectures."""
    recipe: Annotated[tuple[RecipeName, ...], _one_of(RecipeName)] = ("standard",)
    """Training budgets."""
    epochs: Ints = ()
    """Passes over the training images, in place of the recipe's."""
    batch_size: Ints = ()
    """Images per training step, in place of the recipe's."""
    learning_rate: Floats = ()
    """At its peak, in place of the recipe's."""
    num_experts: Ints = ()
    """Experts in the mixture, or in a student's teacher, as are the options down to --gate."""
    top_k: Ints = ()
    """Experts that each image visits."""
    balance: Annotated[tuple[Balance, ...], _one_of(Balance)] = ()
    """Load-balancing losses."""
    balance_weight: Floats = ()
    """Weights of the load-balancing loss."""
    capacity_factor: Floats = ()
    """Rows an expert takes per training batch, as a multiple of an even share."""
    noise: Annotated[tuple[Answer, ...], _one_of(Answer)] = ()
    """Learned noise on the router's logits in training."""
    gate: Annotated[tuple[Gate, ...], _one_of(Gate)] = ()
    """Softmax that weighs the chosen experts: over these alone, or over all."""
    teacher: Annotated[tuple[TeacherName, ...], _one_of(TeacherName)] = ()
    """Of a student."""
    temperature: Floats = ()
    """Of a student: divides the logits of teacher and student before the softmax."""
    alpha: Floats = ()
    """Of a student: weight of the distillation term, from 0 to 1."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            is_used = any(setting.name in OF_MODEL[model] for model in self.model)
            if getattr(self, setting.name) and setting.name not in {"model", "seeds", *OF_ALL} and not is_used:
                models = " or ".join(model for model, names in OF_MODEL.items() if setting.name in names)
                raise UserError(f"{_option(setting.name)} is for --model {models}")
        num_rows = math.prod(max(1, len(getattr(self, setting.name))) for setting in fields(self))
        if num_rows > MAX_ROWS:
            raise UserError(f"the grid has {num_rows:,} combinations; {MAX_ROWS:,} are the most")

    def combinations(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Every one of the values that were given of these options, by name."""
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        for values in itertools.product(*given.values()):
            yield dict(zip(given, values, strict=True))

    def find_rows(self) -> Rows:
        """Every row once, and a line for each combination that cannot be.

        Raises:
            UserError: a value fits no other.
        """
        settings: dict[Row, dict[str, Any]] = {}
        used: set[tuple[str, Any]] = set()
        reasons: dict[str, None] = {}
        for model in self.model:
            for combination in self.combinations(OF_MODEL[model]):
                try:
                    settings.setdefault(_find_row(model, combination), combination)
                    used.update(combination.items())
                except UserError as error:
                    reasons[str(error)] = None
        for name in itertools.chain.from_iterable(OF_MODEL.values()):
            for value in getattr(self, name):
                if (name, value) not in used:
                    raise UserError(f"{_option(name)} {value} is in no row: {'; '.join(reasons)}")
        return Rows(settings, [*reasons])


def _find_row(model: ModelName, settings: dict[str, Any]) -> Row:
    """The row of a model with these settings.

    Raises:
        UserError: they do not fit together.
    """
    if model == "ffn":
        return FFN
    routing = {name: value for name, value in settings.items() if name in ROUTING}
    if "noise" in routing:
        routing["noise"] = routing["noise"] == "yes"
    moe = sparse_moe(RoutingConfig(**routing))
    if model == "moe":
        return moe
    softening = DistillationConfig(**{name: value for name, value in settings.items() if name in SOFTENING})
    return student(FFN if settings.get("teacher") == "ffn" else moe, softening)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
