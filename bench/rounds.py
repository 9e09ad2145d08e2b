"""Rounds of load in an interleaved order, and what they amount to. Called by `suites` and `fake_suite`.

`order` says who is loaded when: the arms in turn, backwards in every second round, so that neither is always the one that
comes after a pause. `run_load` is one round in a process of its own. `medians` turns the counted rounds into one entry per
arm, with the ratios of each pair to the other arms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench import cpu
from bench.arms import Arm
from bench.load import LoadPlan
from bench.stats import ratio_summary, summary
from cluster.errors import LaunchError

MEASURED = (
    "tok_per_s", "req_per_s", "ttft_ms_p50", "ttft_ms_p99", "gap_ms_p50", "gap_ms_p99", "latency_ms_p50", "latency_ms_p99",
    "delay_ms_p50", "delay_ms_p99", "load_cpu_s",
)  # fmt: skip
"""Numbers of a round that get a median and a ratio."""


def order(arms: Sequence[str], pairs: int) -> Iterator[tuple[int, str]]:
    """(round, arm) of a whole comparison; round 0 is the warm-up, which is not counted."""
    for number in range(pairs + 1):
        for arm in arms if number % 2 == 0 else reversed(arms):
            yield number, arm


def load_command(plan: LoadPlan) -> list[str]:
    """The command line of a round. The key travels in the environment, not in the process list."""
    argv = [sys.executable, "-m", "bench", "load", "--url", plan.url, "--model", plan.model, "--streams", str(plan.streams)]
    argv += ["--requests", str(plan.requests), "--max-tokens", str(plan.max_tokens), "--seed", str(plan.seed)]
    argv += ["--words", str(plan.words), "--api", plan.api, "--ramp", str(plan.ramp_s), "--timeout", str(plan.timeout_s)]
    argv += ["--certificate", plan.certificate] if plan.certificate is not None else []
    return argv + (["--stamps"] if plan.stamps else [])


def last_line(output: str) -> dict[str, Any]:
    """Our generator's result: the last line it prints."""
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def run_load(
    arm: Arm, plan: LoadPlan, number: int, argv: list[str] | None = None, read: Callable[[str], dict[str, Any]] = last_line
) -> dict[str, Any]:
    """One round: load in its own process, CPU seconds of the arm's processes around it.

    Args:
        arm: Who is loaded.
        plan: How.
        number: Of the round; 0 is the warm-up.
        argv: Another load generator's command, ours by default.
        read: Makes the round's numbers from what the generator printed.

    Raises:
        LaunchError: the load generator itself failed; failed requests are in the result.
    """
    before = cpu.moment(arm.roots())
    start = time.monotonic()
    done = subprocess.run(
        argv or load_command(plan),
        env=os.environ | {"TIDEPOOL_BENCH_KEY": plan.key, "OPENAI_API_KEY": plan.key or "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = cpu.moment(arm.roots())
    if done.returncode:
        raise LaunchError(f"the load generator ended with code {done.returncode}:\n{done.stderr[-1500:]}")
    result = read(done.stdout)
    # What is not the arm's is the load generator, the idle servers and whatever else the machine did.
    result |= {"arm": arm.name, "round": number, "counted": number > 0, "window_s": time.monotonic() - start}
    result |= {"cpu_s": cpu.spent(before, after), "rss_mib": _resident(after)}
    return result


def _resident(moment: cpu.Moment) -> dict[str, float]:
    total: dict[str, float] = {}
    for pid, name in moment.groups.items():
        total[name] = total.get(name, 0.0) + moment.rss[pid] / 2**20
    return total


def medians(rounds: Sequence[dict[str, Any]], arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per arm: medians with min and max, CPU seconds per group, failures, and the paired ratios to every other arm."""
    counted = {arm: [r for r in rounds if r["arm"] == arm and r["counted"]] for arm in arms}
    result: dict[str, dict[str, Any]] = {}
    for arm, own in counted.items():
        own.sort(key=lambda r: int(r["round"]))
        entry: dict[str, Any] = {name: _dict(summary([r.get(name) for r in own])) for name in MEASURED if _measured(own, name)}
        groups = sorted({name for r in own for name in r["cpu_s"]})
        entry["cpu_s"] = {name: _dict(summary([r["cpu_s"].get(name, 0.0) for r in own])) for name in groups}
        entry["failures"] = sum(int(r["failures"]) for r in own)
        entry["requests"] = sum(int(r["requests"]) for r in own)
        entry["ratios"] = {}
        for other, theirs in counted.items():
            if other != arm and len(theirs) == len(own):
                theirs.sort(key=lambda r: int(r["round"]))
                ratios = {n: _dict(ratio_summary([r.get(n) for r in own], [r.get(n) for r in theirs])) for n in MEASURED}
                entry["ratios"][other] = {name: ratio for name, ratio in ratios.items() if ratio}
        result[arm] = entry
    return result


def failures(rounds: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Failed requests per arm in the counted rounds."""
    total: dict[str, int] = {}
    for r in rounds:
        if r["counted"]:
            total[r["arm"]] = total.get(r["arm"], 0) + int(r["failures"])
    return total


def _measured(rounds: Sequence[dict[str, Any]], name: str) -> bool:
    return any(r.get(name) is not None for r in rounds)


def _dict(value: Any) -> dict[str, float | int] | None:
    return value.as_dict() if value is not None else None
