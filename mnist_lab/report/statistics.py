"""Intervals: how far a figure can be trusted. No torch here."""

import math
from collections.abc import Sequence


def confidence_interval(values: Sequence[float]) -> float:
    """Half-width of the Student-t 95 % interval of the mean; NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    from scipy import stats  # takes a second to import, which one seed need not wait for

    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(list(values)))


def binomial_interval(share: float, num: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share that was counted on `num` independent images (Wilson 1927)."""
    z = 1.959963984540054
    middle = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return max(0.0, middle - half), min(1.0, middle + half)
