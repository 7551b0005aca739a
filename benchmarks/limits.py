"""What this machine can do at most: matrix products per precision, and bytes read per second."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mnist_lab.measure import measure_latency
from mnist_lab.runtimes import Precision

SIZES = (256, 512, 1024, 2048)  # of square matrices: the best of them is the limit
NUM_ROUNDS = 5


def product_rate(precision: Precision) -> float:
    """Operations (multiplications and additions) per second of the best matrix product, on torch's threads."""
    calls = {size: _product(precision, size) for size in SIZES}
    latencies = measure_latency(calls, num_rounds=NUM_ROUNDS)
    return max(2 * size**3 / (latency.median_ms / 1e3) for size, latency in latencies.items())


def _product(precision: Precision, size: int) -> Callable[[], Tensor]:
    if precision == "INT8":
        a, b = (torch.randint(-127, 128, (size, size), dtype=torch.int8) for _ in range(2))  # (size, size) each
        return lambda: torch._int_mm(a, b)
    dtype = torch.bfloat16 if precision == "BF16" else torch.float32
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))  # (size, size) each
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def read_rate(num_bytes: int) -> float:
    """Bytes per second that repeated sums over a buffer of this size reach: out of whatever cache holds it."""
    buffer = torch.ones(max(1, num_bytes // 4))
    (latency,) = measure_latency({"sum": buffer.sum}, num_rounds=NUM_ROUNDS).values()
    return buffer.nbytes / (latency.median_ms / 1e3)


def shortest_ms(*, operations: float, num_bytes: float, operations_per_s: float, bytes_per_s: float) -> float:
    """The roofline: no pass is faster than its products at the best rate, nor than reading its weights once."""
    return 1e3 * float(np.maximum(operations / operations_per_s, num_bytes / bytes_per_s))
