"""A model's gateways and engines second by second, without any of them: what a replica policy does with a trace of arrivals.

Requests wait in one queue, occupy a slot for as long as their tokens take, and leave. A replica starts for `boot_s` before it
has slots; one that is taken away gives its slots back as its requests end. A policy sees what Serve would bring it: means over
the last seconds, nothing from a replica that just began. An hour takes some tens of milliseconds.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from serve_apps.autoscale import Limits, Observation, ReplicaLoad, State, decide

Policy = Callable[[Observation, float], int]


@dataclass(frozen=True)
class Engine:
    """What one replica can do. `answers` are lengths in tokens and their shares; a KV cache holds `kv_requests`."""

    slots: int = 64
    boot_s: int = 60
    tokens_per_s: float = 30.0
    answers: tuple[tuple[int, float], ...] = ((100, 0.5), (300, 0.35), (900, 0.15))
    kv_requests: int = 80
    look_back_s: int = 6
    silent_s: int = 3

    @property
    def service_s(self) -> float:
        return sum(tokens * share for tokens, share in self.answers) / self.tokens_per_s


@dataclass
class Run:
    """What happened: targets, second by second; replica-seconds, and those of one who knows the load and waits for no boot."""

    targets: list[int] = field(default_factory=list)
    replica_seconds: float = 0.0
    ideal_seconds: float = 0.0
    waits: Counter[int] = field(default_factory=Counter)

    @property
    def factor(self) -> float:
        """Replica-seconds over the ideal."""
        return self.replica_seconds / self.ideal_seconds

    @property
    def moves(self) -> int:
        """Changes of the target."""
        return sum(1 for before, after in pairwise(self.targets) if before != after)

    @property
    def turns(self) -> int:
        """Times a scale-up followed a scale-down or the other way round."""
        steps = [after - before for before, after in pairwise(self.targets) if after != before]
        return sum(1 for before, after in pairwise(steps) if before * after < 0)

    def wait_s(self, part: float) -> int:
        """A percentile of the wait for a slot."""
        left = part * self.waits.total()
        for seconds in sorted(self.waits):
            left -= self.waits[seconds]
            if left <= 0:
                return seconds
        return 0

    def line(self, name: str) -> str:
        return (
            f"| {name} | {max(self.targets)} | {self.moves} | {self.turns} | {self.factor:.2f} "
            f"| {self.wait_s(0.5)} / {self.wait_s(0.95)} |"
        )


class Ours:
    """`decide`, with its state kept."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.state = State()
        self.whys: list[str] = []

    def __call__(self, seen: Observation, now: float) -> int:
        decision = decide(seen, self.limits, self.state, now)
        self.state = decision.state
        if decision.replicas != seen.target:
            self.whys.append(f"{now:.0f} s: {seen.target} to {decision.replicas}, {decision.why}")
        return decision.replicas


def arrivals(rates: Sequence[float], seed: int = 0) -> list[int]:
    """Requests that come in each second, by their rate."""
    return [int(count) for count in np.random.default_rng(seed).poisson(rates)]


def simulate(
    coming: Sequence[int], rates: Sequence[float], policy: Policy, limits: Limits, engine: Engine, start: int = 1
) -> Run:
    """Replay `coming` requests per second; `rates` is what an all-knowing policy would size by. Begins with `start` replicas."""
    run = Run()
    target, running, waiting = start, 0, 0
    serving: list[int] = [-1000] * start  # when each replica began to serve
    starting: deque[int] = deque()
    queue: deque[list[int]] = deque()
    done: Counter[int] = Counter()
    owed = [0.0] * len(engine.answers)
    recent: deque[tuple[int, int]] = deque(maxlen=engine.look_back_s)
    for now, (count, rate) in enumerate(zip(coming, rates, strict=True)):
        while starting and starting[0] <= now:
            serving.append(starting.popleft())
        running -= done.pop(now, 0)
        waiting += count
        if count:
            queue.append([now, count])
        free = len(serving) * engine.slots - running
        while queue and free > 0:
            taken = min(free, queue[0][1])
            run.waits[now - queue[0][0]] += taken
            _occupy(taken, now, engine, owed, done)
            queue[0][1] -= taken
            if not queue[0][1]:
                queue.popleft()
            running, waiting, free = running + taken, waiting - taken, free - taken
        recent.append((running, waiting))
        target = policy(_observe(target, serving, recent, now, engine), float(now))
        assert limits.min_replicas <= target <= limits.max_replicas, f"{target} at {now} s"
        while len(serving) + len(starting) < target:
            starting.append(now + engine.boot_s)
        while len(serving) + len(starting) > target:
            _ = starting.pop() if starting else serving.pop()
        run.targets.append(target)
        leaving = max(0, math.ceil(running / engine.slots) - len(serving))
        run.replica_seconds += target + leaving
        run.ideal_seconds += limits.clamp(math.ceil(rate * engine.service_s / limits.target_ongoing_requests))
    return run


def _occupy(taken: int, now: int, engine: Engine, owed: list[float], done: Counter[int]) -> None:
    """Give slots to `taken` requests; of each length as many as its share asks for."""
    left = taken
    for place, (tokens, share) in enumerate(engine.answers):
        owed[place] += taken * share
        last = place == len(engine.answers) - 1
        some = left if last else max(0, min(left, int(owed[place])))
        owed[place] -= some
        left -= some
        done[now + max(1, round(tokens / engine.tokens_per_s))] += some


def _observe(target: int, serving: list[int], recent: Sequence[tuple[int, int]], now: int, engine: Engine) -> Observation:
    running = sum(pair[0] for pair in recent) / len(recent)
    waiting = sum(pair[1] for pair in recent) / len(recent)
    if not serving:
        return Observation(target, (), waiting)
    each = running / len(serving)
    load = ReplicaLoad(
        running=each,
        queued=waiting / len(serving),
        kv_use=min(1.0, each / engine.kv_requests),
        service_s=engine.service_s if running else None,
    )
    silent = sum(1 for began in serving if now - began < engine.silent_s)
    return Observation(target, (load,) * (len(serving) - silent) + (None,) * silent)
