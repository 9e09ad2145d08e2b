"""The gateway with the model's cost out: fake engine direct, and through the gateway, in paired rounds.

Streams start spread over the length of one stream, so tokens arrive evenly, as from many engines; `--lockstep` makes the
engine send the tokens of all streams at once, as one engine's batches do, and then the last stream of a batch waits for all
others in any front. Figures: CPU of the gateway per streamed chunk (all it used in the round divided by the chunks, so what
requests cost is inside; a round of two-token answers tells the two apart), added delay of chunks and of first tokens, and how
many slow streams it holds. Our gateway runs alone under uvicorn (`python -m serve_apps gateway`), the routers of `rivals` can
stand in its place. Called by `python -m bench gateway --fake`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import processes, rivals, rounds, suites, targets
from bench.arms import Arm, Places, ready, roots_of
from bench.fake import FakePlan
from bench.load import LoadPlan
from bench.stats import Summary, paired_differences, summary
from cluster.errors import ConfigError

MODEL = "fake"
KEY = "sk-bench-fake"
FRONTS = ("ours", *rivals.ROUTERS)


@dataclass(frozen=True)
class FakeSuitePlan:
    """What to measure: fronts, concurrent streams, counted pairs, the engine's pace, and how many slow streams to hold."""

    fronts: tuple[str, ...]
    pairs: int
    places: Places
    streams: int = 200
    rate: float = 20.0
    ttft_s: float = 0.05
    max_tokens: int = 64
    requests_per_stream: int = 2
    held: int = 1000
    lockstep: bool = False
    seed: int = 1


def fake_command(plan: FakePlan, port: int) -> list[str]:
    """The fake engine's process."""
    argv = [sys.executable, "-m", "bench", "fake", "--port", str(port), "--model", plan.model, "--rate", str(plan.rate)]
    argv += ["--ttft", str(plan.ttft_s), "--tokens", str(plan.tokens)]
    return argv + (["--stamps"] if plan.stamps else []) + (["--lockstep"] if plan.lockstep else [])


def front(name: str, places: Places, engine: str, port: int) -> rivals.Rival:
    """The command of a front before the engine at `engine` (no `/v1`)."""
    if name == "ours":
        argv = [sys.executable, "-m", "serve_apps", "gateway", "--engine", f"{MODEL}={engine}", "--port", str(port), "--key", KEY]
        return rivals.Rival(argv, f"http://127.0.0.1:{port}/v1", KEY)
    if name not in rivals.ROUTERS:
        raise ConfigError(f"--arms: {name!r} cannot stand before the fake engine; use {', '.join(FRONTS)}")
    return rivals.ROUTERS[name](places.bench_dir, engine, MODEL, port)


@contextlib.contextmanager
def running(names: tuple[str, ...], places: Places, engine: FakePlan) -> Iterator[dict[str, Arm]]:
    """The fake engine (`direct`) and the fronts before it, up and answering."""
    with contextlib.ExitStack() as stack:
        root = f"http://127.0.0.1:{places.port(12)}"
        fake = processes.start("fake engine", fake_command(engine, places.port(12)), places.logs)
        stack.callback(processes.stop, fake)
        processes.wait_until(lambda: processes.answers(f"{root}/health"), fake, "the fake engine", 30)
        arms = {"direct": Arm("direct", f"{root}/v1", "", MODEL, roots_of(fake))}
        for index, name in enumerate(names):
            rival = front(name, places, root, places.port(13 + 2 * index))
            server = processes.start(f"front {name}", rival.argv, places.logs, rival.env)
            stack.callback(processes.stop, server)
            processes.wait_until(ready(rival.url, rival.key, MODEL), server, name, 120)
            arms[name] = Arm(name, rival.url, rival.key, MODEL, roots_of(server))
        yield arms


def run(plan: FakeSuitePlan, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole measurement: paired rounds, then the held streams."""
    document = suites.describe("fake", {
        "arms": ["direct", *plan.fronts], "streams": plan.streams, "pairs": plan.pairs, "rate": plan.rate, "ttft_s": plan.ttft_s,
        "max_tokens": plan.max_tokens, "requests_per_stream": plan.requests_per_stream, "held": plan.held,
        "lockstep": plan.lockstep, "seed": plan.seed,
    })  # fmt: skip
    found: list[dict[str, Any]] = []
    pace = FakePlan(MODEL, plan.rate, plan.ttft_s, plan.max_tokens, stamps=True, lockstep=plan.lockstep)
    stream_s = plan.ttft_s + plan.max_tokens / plan.rate
    names = ("direct", *plan.fronts)
    with running(plan.fronts, plan.places, pace) as arms:
        for number, name in rounds.order(names, plan.pairs):
            result = rounds.run_load(arms[name], _load(plan, arms[name], number, stream_s), number)
            result["cpu_us_per_chunk"] = cpu_us_per_chunk(result)
            found.append(result)
            say(f"{suites.progress(plan.streams, result)}  CPU {result['cpu_us_per_chunk'] or 0:.1f} us/chunk")
        short = {name: rounds.run_load(arms[name], _short(plan, arms[name]), 1) for name in names}
    held: dict[str, Any] = {}
    if plan.held:
        slow = FakePlan(MODEL, 1.0, 0.5, 8)
        with running(plan.fronts, plan.places, slow) as arms:
            for name in names:
                held[name] = _hold(plan, arms[name], say)
    document["medians"] = {str(plan.streams): rounds.medians(found, names)}
    document["figures"] = {name: figures(found, name) | split(found, short[name], name) for name in plan.fronts}
    document["short"] = short
    document["held"] = held
    ours = document["figures"].get("ours")
    document["targets"] = targets.fake({n: _median(v) for n, v in ours.items()}) if ours else []
    document["rounds"] = {str(plan.streams): found}
    return document


def cpu_us_per_chunk(result: dict[str, Any]) -> float | None:
    """CPU microseconds of the arm's own processes per chunk that reached the client."""
    return 1e6 * _own_cpu(result) / result["chunks"] if result["chunks"] else None


def figures(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """What a front costs, from its counted rounds and the direct ones they are paired with."""
    own = {r["round"]: r for r in found if r["arm"] == name and r["counted"]}
    direct = {r["round"]: r for r in found if r["arm"] == "direct" and r["counted"]}
    pairs = sorted(own.keys() & direct.keys())

    def added(metric: str) -> dict[str, Any] | None:
        values = summary(paired_differences([own[n].get(metric) for n in pairs], [direct[n].get(metric) for n in pairs]))
        return values.as_dict() if values else None

    cost: Summary | None = summary([own[n]["cpu_us_per_chunk"] for n in pairs])
    return {
        "cpu_us_per_chunk": cost.as_dict() if cost else None,
        "chunks_per_s_per_core": 1e6 / cost.median if cost and cost.median else None,
        "added_delay_p50_ms": added("delay_ms_p50"),
        "added_delay_p99_ms": added("delay_ms_p99"),
        "added_ttft_p50_ms": added("ttft_ms_p50"),
        "added_ttft_p99_ms": added("ttft_ms_p99"),
        "failures": sum(int(r["failures"]) for r in own.values()),
    }


def split(found: list[dict[str, Any]], short: dict[str, Any], name: str) -> dict[str, float | None]:
    """What a request and what a further chunk cost in CPU microseconds, from long answers and from answers of two tokens."""
    own = [r for r in found if r["arm"] == name and r["counted"]]
    chunks, requests = sum(r["chunks"] for r in own), sum(r["requests"] for r in own)
    cpu, cpu_short = sum(_own_cpu(r) for r in own), _own_cpu(short)
    scale = chunks * short["requests"] - short["chunks"] * requests
    if scale <= 0 or not short["requests"]:
        return {"cpu_us_per_request_only": None, "cpu_us_per_chunk_only": None}
    per_chunk = (cpu * short["requests"] - cpu_short * requests) / scale
    per_request = (cpu_short - per_chunk * short["chunks"]) / short["requests"]
    return {"cpu_us_per_request_only": 1e6 * per_request, "cpu_us_per_chunk_only": 1e6 * per_chunk}


def _own_cpu(result: dict[str, Any]) -> float:
    return float(sum(seconds for name, seconds in result["cpu_s"].items() if name != "machine"))


def _short(plan: FakeSuitePlan, arm: Arm) -> LoadPlan:
    return LoadPlan(arm.url, arm.key, MODEL, 20, 1000, 2, plan.seed * 1000 + 999, 24, "chat", 0.2, 120.0, True)


def _load(plan: FakeSuitePlan, arm: Arm, number: int, stream_s: float) -> LoadPlan:
    requests = plan.streams * plan.requests_per_stream
    seed = plan.seed * 1000 + number
    return LoadPlan(arm.url, arm.key, MODEL, plan.streams, requests, plan.max_tokens, seed, 24, "chat", stream_s, 120.0, True)


def _hold(plan: FakeSuitePlan, arm: Arm, say: Callable[[str], None]) -> dict[str, Any]:
    """Many slow streams at once: a token a second each."""
    load = LoadPlan(arm.url, arm.key, MODEL, plan.held, plan.held, 8, plan.seed, 24, "chat", 2.0, 120.0)
    result = rounds.run_load(arm, load, 1)
    say(suites.progress(plan.held, result))
    kept = (
        "requests",
        "failures",
        "failure_reasons",
        "status",
        "chunks",
        "ttft_ms_p50",
        "ttft_ms_p99",
        "gap_ms_p99",
        "cpu_s",
        "rss_mib",
    )
    return {name: result[name] for name in kept}


def _median(value: Any) -> float | None:
    found: float | None = value["median"] if isinstance(value, dict) else value
    return found
