"""The project's targets, and whether a run met them. Pure: figures of the suites in, verdicts out.

A figure that was not measured is a verdict of its own (`not measured`), never a pass.
"""

from __future__ import annotations

from typing import Any

THROUGHPUT_FLOOR = {1: 0.90, 8: 0.95, 32: 0.95, 128: 0.90}
"""Streams: smallest allowed ratio of our output tokens per second to bare vLLM's."""
TTFT_P50_CEILING = 1.25
GAP_P99_CEILING = 1.3
CPU_US_PER_CHUNK_CEILING = 80.0
ADDED_P99_MS_CEILING = 3.0
TRAIN_THROUGHPUT_FLOOR = 0.90
"""Smallest allowed ratio of our training loop's tokens per second to those of DeepSpeed's own launcher."""


def verdict(name: str, value: float | None, *, floor: float | None = None, ceiling: float | None = None) -> dict[str, Any]:
    """One target: its name, the measured value, the limit and `pass`, `miss` or `not measured`."""
    limit = f">= {floor:g}" if floor is not None else f"<= {ceiling:g}"
    if value is None:
        result = "not measured"
    else:
        met = (floor is None or value >= floor) and (ceiling is None or value <= ceiling)
        result = "pass" if met else "miss"
    return {"target": name, "value": value, "limit": limit, "result": result}


def gateway(medians: dict[str, dict[str, Any]], failures: dict[str, int]) -> list[dict[str, Any]]:
    """The targets of the comparison with bare vLLM; none when our endpoint was not an arm.

    Args:
        medians: Per stream count (as text) and arm the ratios to another arm, medians of pairs:
            `{"8": {"ours": {"ratios": {"bare": {"tok_per_s": {"median": 0.97, …}}}}}}`.
        failures: Failed requests per arm, in counted rounds.
    """
    found: list[dict[str, Any]] = []
    if not any("ours" in arms for arms in medians.values()):
        return found
    for streams, floor in THROUGHPUT_FLOOR.items():
        arms = medians.get(str(streams), {})
        if not arms:
            continue
        found.append(verdict(f"output tok/s against bare, {streams} streams", _ratio(arms, "bare", "tok_per_s"), floor=floor))
        if "vllm-router" in arms:
            ahead = _ratio(arms, "vllm-router", "tok_per_s")
            found.append(verdict(f"output tok/s against vllm-router, {streams} streams", ahead, floor=1.0))
        ttft, gap = _ratio(arms, "bare", "ttft_ms_p50"), _ratio(arms, "bare", "gap_ms_p99")
        found.append(verdict(f"TTFT p50 against bare, {streams} streams", ttft, ceiling=TTFT_P50_CEILING))
        found.append(verdict(f"inter-token p99 against bare, {streams} streams", gap, ceiling=GAP_P99_CEILING))
    found.append(verdict("failures of our endpoint", failures.get("ours"), ceiling=0))
    return found


def train(workers: int, ratio: float | None, same_first_loss: bool) -> list[dict[str, Any]]:
    """The target of training: what Ray and our loop cost beside DeepSpeed's own launcher, if the work was the same."""
    name = f"tokens/s against DeepSpeed's own launcher, {workers} worker{'s' if workers > 1 else ''}"
    return [verdict(name, ratio if same_first_loss else None, floor=TRAIN_THROUGHPUT_FLOOR)]


def fake(figures: dict[str, float | None]) -> list[dict[str, Any]]:
    """The targets on the fake engine; `figures` as `fake_suite` names them."""
    return [
        verdict("gateway CPU per streamed chunk, us", figures.get("cpu_us_per_chunk"), ceiling=CPU_US_PER_CHUNK_CEILING),
        verdict("added p99 of chunk delivery, ms", figures.get("added_delay_p99_ms"), ceiling=ADDED_P99_MS_CEILING),
        verdict("added p99 of time to first token, ms", figures.get("added_ttft_p99_ms"), ceiling=ADDED_P99_MS_CEILING),
        verdict("failures through the gateway", figures.get("failures"), ceiling=0),
    ]


def _ratio(arms: dict[str, Any], other: str, name: str) -> float | None:
    """The median of the pairs' ratios of ours to another arm."""
    ratio = arms.get("ours", {}).get("ratios", {}).get(other, {}).get(name)
    return float(ratio["median"]) if ratio else None
