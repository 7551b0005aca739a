"""How much memory tensors take at the peak of a computation."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def measure_peak(compute: Callable[[], T]) -> tuple[T, int]:
    """What `compute` returns, and the bytes of all tensors that it made and had not freed when they were most.

    What was there before, such as weights and inputs, does not count, nor does what an operator takes and frees inside.
    """
    with _Allocations() as allocations:
        result = compute()
    return result, allocations.peak


class _Allocations(TorchDispatchMode):
    """Every storage that operators make, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and to say so to the compiler would import it: seconds, for nothing."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = {storage for storage in _storages(result) if storage not in self._known}
        for storage in made - _storages((args, kwargs)) if made else ():
            self._known.add(storage)
            self._count(storage.nbytes())
            weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
