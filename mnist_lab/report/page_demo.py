"""What the page's live demo is made of: an engine for browsers, and the models that it runs there. No torch here."""

import base64
import gzip
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mnist_lab.report.results import Model

MAX_MODELS = 12
MAX_BYTES = 8_000_000  # of engine and models, packed


@dataclass(frozen=True)
class DemoModel:
    """One model, packed."""

    name: str
    packed: str
    tells_experts: bool = False  # which of them it chose


@dataclass(frozen=True)
class Demo:
    """All that runs in the page."""

    engine: str  # its name and version
    module: str  # JavaScript, packed
    wasm: str  # that it instantiates, packed
    models: Sequence[DemoModel]
    left_out: str  # names of the other models


def pack(content: bytes) -> str:
    """Compressed (RFC 1952) and as text (base 64), which browsers take apart by themselves."""
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def order_for_demo(models: Sequence[Model]) -> list[Model]:
    """Those in fewer bits first, of each family its first model before others, small files before large ones."""
    seen: Counter[str] = Counter()
    places = {}
    for model in models:
        places[model.name] = (model.row["precision"] == "FP32", seen[model.family], model.row["file_mb"])
        seen[model.family] += 1
    return sorted(models, key=lambda model: places[model.name])
