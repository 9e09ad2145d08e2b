"""The gateway suite: our endpoint beside bare vLLM and other fronts, in interleaved pairs on one machine.

For each stream count the arms are loaded in turn (see `rounds.order`) with the same number of requests and with prompts no
round has seen, so that no arm profits from another's prefix cache. It returns one document: where and how it was measured,
every round, the medians, the targets. The fake engine's suite is `fake_suite`. Called by `python -m bench gateway`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, rounds, targets, vllm_load
from bench.arms import Arm, Places, running
from bench.load import LoadPlan
from bench.prompts import words_for
from cluster.errors import LaunchError

QUICK_REQUESTS = {1: 6, 8: 32, 32: 96, 128: 256}
"""Requests per round and stream count; a full run does twice as many."""


@dataclass(frozen=True)
class SuitePlan:
    """What to compare: arms in order, stream counts, counted pairs, tokens in and out, and which load generator."""

    arms: tuple[str, ...]
    streams: tuple[int, ...]
    pairs: int
    places: Places
    quick: bool = False
    prompt_tokens: int = 96
    max_tokens: int = 64
    api: str = "chat"
    load: str = "own"
    seed: int = 1


def requests_for(streams: int, quick: bool) -> int:
    """Requests in one round; at least two per stream."""
    known = QUICK_REQUESTS.get(streams, max(2 * streams, 6))
    return known if quick else 2 * known


def run(plan: SuitePlan, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole comparison."""
    document = describe("gateway", {
        "arms": list(plan.arms), "streams": list(plan.streams), "pairs": plan.pairs, "quick": plan.quick, "load": plan.load,
        "prompt_tokens": plan.prompt_tokens, "max_tokens": plan.max_tokens, "api": plan.api, "seed": plan.seed,
    })  # fmt: skip
    measured: dict[str, list[dict[str, Any]]] = {}
    with running(list(plan.arms), plan.places, say) as (servers, model):
        by_name = {arm.name: arm for arm in servers}
        document["engine"] = {"id": model.id, "engine_kwargs": model.engine_kwargs, "env": model.env}
        document["arms"] = {arm.name: arm.notes for arm in servers}
        words = _calibrate(servers[0], plan)
        document["prompt_words"] = words
        for streams in plan.streams:
            found = measured.setdefault(str(streams), [])
            for number, name in rounds.order(plan.arms, plan.pairs):
                arm = by_name[name]
                seed = ((plan.seed * 1000 + streams) * 1000 + number) * 10 + plan.arms.index(name)
                load = LoadPlan(
                    arm.url,
                    arm.key,
                    arm.model,
                    streams,
                    requests_for(streams, plan.quick),
                    plan.max_tokens,
                    seed,
                    words,
                    plan.api,
                    certificate=arm.certificate,
                )
                if plan.load == "vllm":
                    result = vllm_load.run(arm, load, number, str(model.engine_kwargs["model"]), plan.prompt_tokens)
                else:
                    result = rounds.run_load(arm, load, number)
                found.append(result)
                say(progress(streams, result))
    document["medians"] = {streams: rounds.medians(found, plan.arms) for streams, found in measured.items()}
    document["targets"] = targets.gateway(document["medians"], rounds.failures([r for found in measured.values() for r in found]))
    document["rounds"] = measured
    return document


def describe(suite: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The head of a document: what, when, which commit, versions, hardware."""
    return {
        "suite": suite,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(Path(__file__).parent),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "arguments": arguments,
    }


def progress(streams: int, result: dict[str, Any]) -> str:
    """One line for the person who waits."""

    def number(name: str) -> str:
        value = result.get(name)
        return "-" if value is None else f"{value:.1f}"

    label = "warm-up" if not result["counted"] else f"round {result['round']}"
    line = (
        f"{streams:>4} streams  {label:<8}  {result['arm']:<12} {number('tok_per_s'):>8} tok/s  TTFT {number('ttft_ms_p50')} ms"
    )
    line += f"  gap p99 {number('gap_ms_p99')} ms  failures {result['failures']}"
    return line + (f"  {result['failure_reasons']}" if result["failures"] else "")


def _calibrate(arm: Arm, plan: SuitePlan) -> int:
    """Words per prompt, from two probes of the running server."""

    def probe(words: int) -> tuple[int, int]:
        seed = 7 * plan.seed + words
        asked = LoadPlan(arm.url, arm.key, arm.model, 1, 4, plan.max_tokens, seed, words, plan.api, certificate=arm.certificate)
        result = rounds.run_load(arm, asked, 0)
        if result["failures"]:
            raise LaunchError(f"{arm.name}: the probe failed: {result['failure_reasons']}")
        return words, round(result["prompt_tokens"] / result["requests"])

    probes: Sequence[tuple[int, int]] = [probe(8), probe(48)]
    return words_for(plan.prompt_tokens, (probes[0], probes[1]))
