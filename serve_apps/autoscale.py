"""How many replicas a model should have: a pure function of what its replicas and gateways say, the clock passed in.

Demand is counted in requests at engines. Those that wait in gateways for want of a slot are a backlog, not a load: they count
as what comes in faster than it goes out (the growth of the queue times the time that a request takes), and as what it takes to
work the rest off in `DRAIN_S`; together at most as what they are. Whoever buys for a queue as if it were load buys too much.
Demand by `target_ongoing_requests`, the KV cache in use by `max_kv_use`, and a time to first token over `target_ttft_s` each
ask for replicas; the largest wins. Replicas that are starting count as if they served already, so nothing is bought twice while
an engine loads.

Up: to the size of the demand, at once, after it was too much for `upscale_delay_s`; without delay from zero. Down: only where
the rest would still be below `KEEP` of the limits, after that held for `downscale_delay_s`, to the most that was needed
meanwhile, by half at most. A replica that says nothing, since it just began or its figures are old, never lets one go.

Knows nothing of Serve: `serve_policy.py` asks it in Serve's controller, the tests replay traces through it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

DRAIN_S = 120.0
GROWTH_S = 10.0
KEEP = 0.8


@dataclass(frozen=True)
class ReplicaLoad:
    """One replica, lately.

    Args:
        running: Requests that its engine works on.
        waiting: Requests in its engine that are not worked on.
        queued: Requests in gateways for want of a slot, this replica's part of them.
        kv_use: Part of the KV cache that requests hold, 0 to 1.
        ttft_s: Mean time to first token in the engine; None when no request got one.
        service_s: Mean time that a request spent in the engine; None when none was finished.
    """

    running: float
    waiting: float = 0.0
    queued: float = 0.0
    kv_use: float = 0.0
    ttft_s: float | None = None
    service_s: float | None = None


@dataclass(frozen=True)
class Observation:
    """What is known of one model.

    Args:
        target: Replicas wanted so far: those that run and those that start.
        replicas: Those that run; None for one without fresh figures.
        held: Requests that wait for a model that has no replica.
    """

    target: int
    replicas: tuple[ReplicaLoad | None, ...] = ()
    held: float = 0.0


@dataclass(frozen=True)
class Limits:
    """The configuration; see `cluster.config.AutoscalingConfig`."""

    min_replicas: int
    max_replicas: int
    target_ongoing_requests: float
    upscale_delay_s: float
    downscale_delay_s: float
    downscale_to_zero_delay_s: float
    max_kv_use: float = 0.9
    target_ttft_s: float | None = None

    def clamp(self, replicas: int) -> int:
        return max(self.min_replicas, min(self.max_replicas, replicas))


@dataclass(frozen=True)
class State:
    """What one decision leaves to the next: since when there is too much, or too little, to do, and the most needed since; how
    many waited in gateways when that was last looked at, and by how many per second it had grown."""

    high_since: float | None = None
    low_since: float | None = None
    low_peak: int = 0
    serving: int | None = None
    looked_at: float = 0.0
    queued: float = 0.0
    growth: float | None = None


@dataclass(frozen=True)
class Decision:
    """Replicas wanted from now on, why in one line, and the state for the next decision."""

    replicas: int
    why: str
    state: State


def decide(seen: Observation, limits: Limits, state: State, now: float) -> Decision:
    """The next target. `now` is any clock in seconds that only goes forward; call it about once a second."""
    target = seen.target
    state = _look(seen, state, now)
    calm = replace(state, high_since=None, low_since=None, low_peak=0)
    if limits.clamp(target) != target:
        return Decision(limits.clamp(target), f"the limits are {limits.min_replicas} to {limits.max_replicas}", calm)
    most, why = _needed(seen, limits, state.growth or 0.0, 1.0)
    if limits.clamp(most) > target and seen.replicas and state.growth is None:
        return Decision(target, f"{why}, with replicas that just came or went", calm)
    if limits.clamp(most) > target:
        since = now if state.high_since is None else state.high_since
        if target == 0 or now - since >= limits.upscale_delay_s:
            return Decision(limits.clamp(most), why, calm)
        return Decision(target, f"{why}, for {now - since:.0f} s", replace(calm, high_since=since))
    if None in seen.replicas:
        return Decision(target, f"{seen.replicas.count(None)} of {len(seen.replicas)} replicas say nothing", calm)
    least, why = _needed(seen, limits, max(0.0, state.growth or 0.0), KEEP)
    least = limits.clamp(least)
    if least >= target:
        return Decision(target, why, calm)
    since = now if state.low_since is None else state.low_since
    peak = max(state.low_peak, least)
    delay = limits.downscale_to_zero_delay_s if target == 1 else limits.downscale_delay_s
    if now - since < delay:
        return Decision(target, f"{why}, for {now - since:.0f} s", replace(calm, low_since=since, low_peak=peak))
    # The last one goes alone, after a delay of its own.
    lowest = 0 if target == 1 else 1
    return Decision(max(peak, target - max(1, target // 2), lowest), f"{why}, for {now - since:.0f} s", calm)


def _look(seen: Observation, state: State, now: float) -> State:
    """See every `GROWTH_S` how the queue has grown; anew when a replica came or went, which moves requests about."""
    queued = sum(load.queued for load in seen.replicas if load is not None)
    fresh = replace(state, looked_at=now, queued=queued, serving=len(seen.replicas))
    if state.serving is None:
        return replace(fresh, growth=0.0)
    if state.serving != len(seen.replicas):
        return replace(fresh, growth=None)
    if now - state.looked_at < GROWTH_S:
        return state
    return replace(fresh, growth=(queued - state.queued) / (now - state.looked_at))


def _needed(seen: Observation, limits: Limits, growth: float, part: float) -> tuple[int, str]:
    """Replicas that would be at `part` of the limits with what there is to do now, and which limit says so."""
    known = [load for load in seen.replicas if load is not None]
    demand = seen.held + _demand(known, growth)
    asks = [(_ceil(demand / (limits.target_ongoing_requests * part)), f"{demand:.1f} requests")]
    kv_use = sum(load.kv_use for load in known)
    if known:
        asks.append((_ceil(kv_use / (limits.max_kv_use * part)), f"KV cache {kv_use / len(known):.0%} full"))
    times = [load.ttft_s for load in known if load.ttft_s is not None]
    # With one request each, more replicas would not make the first token come earlier.
    if limits.target_ttft_s is not None and times and sum(load.running + load.waiting for load in known) > len(known):
        mean = sum(times) / len(times)
        if mean > limits.target_ttft_s * part:
            more = 1 if mean > limits.target_ttft_s else 0
            asks.append((len(known) + more, f"first token after {mean:.1f} s"))
    most, why = max(asks, key=lambda ask: ask[0])
    return most, f"{why} need {most} at {part:.0%}" if part != 1.0 else f"{why} need {most}"


def _demand(known: list[ReplicaLoad], growth: float) -> float:
    """Requests at engines if none had to wait in gateways and the queue were gone in `DRAIN_S`.

    What comes in takes as many slots as it has requests in a second times seconds that each takes (Little's law); that is what
    runs, and what the queue grows by. While it shrinks, a part of what runs is backlog. The queue counts whole while nobody knows
    how long a request takes.
    """
    here = sum(load.running + load.waiting for load in known)
    queued = sum(load.queued for load in known)
    times = [load.service_s for load in known if load.service_s is not None]
    if not times or not queued:
        return here + queued
    return min(here + queued, max(0.0, here + (growth + queued / DRAIN_S) * sum(times) / len(times)))


def _ceil(value: float) -> int:
    """Rounded up, but for what is only the noise of adding floats."""
    return math.ceil(value - 1e-9)
