"""The arithmetic of the report: percentiles, and medians of ratios of paired rounds. Pure functions, called by the suites.

Ratios are taken inside a pair (two arms measured one after the other) and then summarised by their median, so that a
slow minute of the machine hits both sides of a ratio and not one of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Summary:
    """Median of n values, with the smallest and the largest beside it."""

    median: float
    min: float
    max: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """For the JSON document."""
        return asdict(self)


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile (0 to 100) with linear interpolation, numpy's default; None of nothing."""
    if not values:
        return None
    if not 0 <= q <= 100:
        raise ValueError(f"percentile: q is {q}, it must be between 0 and 100")
    ordered = sorted(values)
    spot = (len(ordered) - 1) * q / 100
    low = int(spot)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (spot - low)


def summary(values: Sequence[float | None]) -> Summary | None:
    """Median, min and max of the values that are numbers; None when there are none."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    return Summary(statistics.median(numbers), min(numbers), max(numbers), len(numbers))


def paired_ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """`ours[i] / theirs[i]` for each pair; a pair with a missing side or a zero below is left out.

    Raises:
        ValueError: the two are not equally long, so they are not pairs.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"paired_ratios: {len(ours)} and {len(theirs)} values are not pairs")
    return [a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b]


def paired_differences(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """`ours[i] - theirs[i]` for each pair; a pair with a missing side is left out."""
    if len(ours) != len(theirs):
        raise ValueError(f"paired_differences: {len(ours)} and {len(theirs)} values are not pairs")
    return [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]


def ratio_summary(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Summary | None:
    """Median of the paired ratios with min and max."""
    return summary(paired_ratios(ours, theirs))
