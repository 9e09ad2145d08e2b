"""The arithmetic of `python -m bench train`: speed from step times, model FLOPs, scaling. Pure; called by `train_suite`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.stats import percentile, ratio_summary, summary

MEASURED = ("tokens_per_s", "step_ms_p50", "step_ms_p90", "memory_mib", "largest_process_mib", "gpu_mib", "first_step_s", "mfu")
"""Numbers of a round that get a median; ratios of all but mfu."""
FORMULA = "FLOPs per token = 6 N + 12 layers x attention width x sequence length; MFU = that x tokens/s / (GPUs x peak)"
_PEAKS = (
    ("B200", 2250.0), ("H200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0), ("A100", 312.0), ("L40S", 362.0), ("L40", 181.0),
    ("A10G", 70.0), ("A10", 125.0), ("L4", 121.0), ("T4", 65.0),
)  # fmt: skip
"""Names of GPUs to dense TFLOP/s in bf16 (T4: fp16), as their makers publish; the first name found counts."""


def steady(step_s: Sequence[float], tokens: Sequence[float], warmup: int) -> dict[str, float]:
    """Speed after the warm-up steps.

    Args:
        step_s: Seconds of each step.
        tokens: Tokens of each step, of all workers.
        warmup: Steps that are left out.

    Returns:
        `tokens_per_s` (mean tokens by the median time), median and 90th percentile of a step, tokens of a step.

    Raises:
        ValueError: no step is left.
    """
    times, counts = list(step_s[warmup:]), list(tokens[warmup:])
    if not times or len(times) != len(counts):
        raise ValueError(f"steady: {len(times)} times and {len(counts)} token counts after {warmup} steps of warm-up")
    median = statistics.median(times)
    p90 = percentile(times, 90)
    assert p90 is not None
    mean = statistics.fmean(counts)
    return {"tokens_per_s": mean / median, "step_ms_p50": 1000 * median, "step_ms_p90": 1000 * p90, "tokens_per_step": mean}


def busy_cores(samples: Sequence[tuple[float, dict[str, float]]], start: float, end: float) -> dict[str, float]:
    """Cores that each kind of process kept busy from the first to the last sample in a span of time; none with fewer than two.

    Args:
        samples: When, and CPU seconds so far by kind.
        start: Of the span, by the same clock.
        end: Of the span.
    """
    inside = [sample for sample in samples if start <= sample[0] <= end]
    if len(inside) < 2:
        return {}
    (began, before), (ended, after) = inside[0], inside[-1]
    busy = {title: (seconds - before.get(title, 0.0)) / (ended - began) for title, seconds in after.items()}
    return {title: cores for title, cores in busy.items() if cores > 0}


def flops_per_token(model: dict[str, int], length: int) -> float:
    """Of forward and backward pass, without what activation checkpointing does twice.

    Args:
        model: `multiplied` parameters (all but an embedding that is only looked up), `layers`, `attention_width` (heads x
            their width).
        length: Tokens of a sequence; dialogues packed into one see less, so this is an upper bound.
    """
    return 6.0 * model["multiplied"] + 12.0 * model["layers"] * model["attention_width"] * length


def peak_tflops(gpus: Sequence[str], precision: str) -> float | None:
    """Of one of these GPUs; None for one that is not known, and for fp32, where it depends on settings."""
    if not gpus or precision == "fp32":
        return None
    return next((peak for name, peak in _PEAKS if name.lower() in gpus[0].lower()), None)


def mfu(tokens_per_s: float, flops: float, gpus: int, peak: float | None) -> float | None:
    """Part of the GPUs' peak that the model's arithmetic takes; None without a peak in TFLOP/s."""
    return tokens_per_s * flops / (gpus * peak * 1e12) if peak else None


def medians(rounds: Sequence[dict[str, Any]], arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per arm: medians with min and max, the causes of the time to the first step, the ratios of pairs to every other arm."""
    found = {arm: sorted((r for r in rounds if r["arm"] == arm), key=lambda r: int(r["round"])) for arm in arms}
    result: dict[str, dict[str, Any]] = {}
    for arm, own in found.items():
        entry: dict[str, Any] = {}
        for name in MEASURED:
            value = summary([r.get(name) for r in own])
            entry[name] = value.as_dict() if value else None
        causes = list(dict.fromkeys(cause for r in own for cause in r["startup"]))
        entry["startup"] = {cause: statistics.median(r["startup"].get(cause, 0.0) for r in own) for cause in causes}
        titles = list(dict.fromkeys(title for r in own for title in r["busy_cores"]))
        busy = {title: statistics.median(r["busy_cores"].get(title, 0.0) for r in own) for title in titles}
        entry["busy_cores"] = dict(sorted(busy.items(), key=lambda item: -item[1]))
        entry["ratios"] = {}
        for other, theirs in found.items():
            if other != arm and len(theirs) == len(own):
                ratios = {n: ratio_summary([r.get(n) for r in own], [r.get(n) for r in theirs]) for n in MEASURED if n != "mfu"}
                entry["ratios"][other] = {name: ratio.as_dict() for name, ratio in ratios.items() if ratio}
        result[arm] = entry
    return result


def scaling(found: dict[str, dict[str, Any]], few: int, many: int) -> dict[str, float] | None:
    """Efficiency of our loop from `few` workers to `many`: 1 means that speed grew with them. None when one was not an arm."""
    ratio = found.get(f"ours-{many}", {}).get("ratios", {}).get(f"ours-{few}", {}).get("tokens_per_s")
    if few == many or not ratio:
        return None
    return {name: ratio[name] * few / many for name in ("median", "min", "max")}


def same_first_loss(rounds: Sequence[dict[str, Any]], tolerance: float = 0.02) -> bool:
    """Whether all arms began with the same model and batch, as far as their first loss tells."""
    losses = [r["first_loss"] for r in rounds]
    return not losses or max(losses) - min(losses) <= tolerance * max(losses)
