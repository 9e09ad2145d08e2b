"""The replica policy: what it does in single situations, and over traces replayed in the simulator, beside Ray Serve's default.

`pytest -s tests/unit/test_autoscale.py` prints the table of docs/operations.md.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable

import numpy as np
import pytest
from autoscale_simulator import Engine, Ours, Policy, Run, arrivals, simulate

from serve_apps.autoscale import GROWTH_S, Limits, Observation, ReplicaLoad, State, decide

LIMITS = Limits(1, 32, 48, upscale_delay_s=5, downscale_delay_s=300, downscale_to_zero_delay_s=600)
SLEEPY = dataclasses.replace(LIMITS, min_replicas=0)
ENGINE = Engine()


def after(limits: Limits, seconds: float, seen: Observation, state: State = State()) -> int:  # noqa: B008  # frozen
    """The target after looking at the same thing, once a second."""
    for now in range(int(seconds) + 1):
        decision = decide(seen, limits, state, float(now))
        if decision.replicas != seen.target:
            return decision.replicas
        state = decision.state
    return seen.target


def busy(count: int, running: float, **more: float) -> tuple[ReplicaLoad, ...]:
    return (ReplicaLoad(running, **more),) * count


def test_somebody_waits_for_a_model_that_sleeps():
    assert decide(Observation(0, held=1), SLEEPY, State(), 0.0).replicas == 1
    assert decide(Observation(0, held=200), SLEEPY, State(), 0.0).replicas == 5
    assert after(SLEEPY, 2000, Observation(0)) == 0


def test_up_to_the_size_of_the_demand_after_the_delay():
    seen = Observation(2, busy(2, 64, queued=68))
    assert after(LIMITS, 4, seen) == 2
    assert after(LIMITS, 6, seen) == 6  # 264 requests, 48 each; nobody knows yet how long they take
    assert after(LIMITS, 6, Observation(2, busy(2, 64, queued=1e6))) == LIMITS.max_replicas


def test_a_backlog_is_not_a_load():
    """A thousand wait, as many as ten seconds ago, and each takes six: that is work for one more, not for twenty."""
    seen = Observation(4, busy(4, 64, queued=250, service_s=6.0))
    assert after(LIMITS, 60, seen) == 7  # the 256 at the engines need 6, a thousand in two minutes one more


def test_a_queue_that_grows_is_sized_by_what_comes_in():
    state, target = State(), 1
    for now in range(60):
        waiting = max(0, now - 20) * 10.0
        decision = decide(Observation(target, busy(1, 64, queued=waiting, service_s=10.0)), LIMITS, state, float(now))
        state, target = decision.state, decision.replicas
    # 6.4 a second go out, 10 more come in: 164 requests at a time, and the backlog on top.
    assert 4 <= target <= 5


def test_what_starts_counts():
    waits = busy(1, 64, queued=80)
    assert after(LIMITS, 60, Observation(1, waits)) == 3
    assert after(LIMITS, 60, Observation(3, waits)) == 3


def test_a_replica_that_came_is_looked_at_before_more_are_asked_for():
    _, state = 0, decide(Observation(2, busy(1, 64, queued=80)), LIMITS, State(), 0.0).state
    for now in range(1, int(GROWTH_S)):
        decision = decide(Observation(2, busy(2, 64, queued=40)), LIMITS, state, float(now))
        state = decision.state
        assert decision.replicas == 2 and "just came or went" in decision.why


def test_a_full_kv_cache_and_a_late_first_token_are_too_much():
    assert after(LIMITS, 60, Observation(2, busy(2, 5, kv_use=0.95))) == 3
    assert after(LIMITS, 60, Observation(2, busy(2, 5, kv_use=0.85))) == 2
    late = busy(2, 5, ttft_s=3.0)
    assert after(LIMITS, 60, Observation(2, late)) == 2
    assert after(dataclasses.replace(LIMITS, target_ttft_s=2.0), 60, Observation(2, late)) == 3
    assert after(dataclasses.replace(LIMITS, target_ttft_s=2.0), 60, Observation(3, late)) == 3, "one is coming"
    alone = busy(2, 1, ttft_s=3.0)
    assert after(dataclasses.replace(LIMITS, target_ttft_s=2.0), 60, Observation(2, alone)) == 2, "more would not help"


def test_none_goes_while_one_is_late_or_full():
    calm = dataclasses.replace(LIMITS, target_ttft_s=2.0)
    assert after(calm, 3000, Observation(4, busy(4, 2))) == 2
    assert after(calm, 3000, Observation(4, busy(4, 2, kv_use=0.7))) == 4
    assert after(calm, 3000, Observation(4, busy(4, 2, ttft_s=1.7))) == 4


def test_down_only_below_the_band_after_the_delay_and_by_half():
    assert after(LIMITS, 3000, Observation(4, busy(4, 29))) == 4  # 116 requests: 3 would be at 81 %
    assert after(LIMITS, 3000, Observation(4, busy(4, 28))) == 3
    assert after(LIMITS, 299, Observation(20, busy(20, 0))) == 20
    assert after(LIMITS, 300, Observation(20, busy(20, 0))) == 10
    assert after(SLEEPY, 3000, Observation(2, busy(2, 0))) == 1


def test_down_to_the_most_that_was_needed_meanwhile():
    state = State()
    for now in range(301):
        running = 35.0 if now == 150 else 5.0
        decision = decide(Observation(5, busy(5, running)), LIMITS, state, float(now))
        state = decision.state
    assert decision.replicas == 5, "for a moment all were needed"
    state = State()
    for now in range(301):
        running = 28.0 if now == 150 else 5.0
        decision = decide(Observation(5, busy(5, running)), LIMITS, state, float(now))
        state = decision.state
    assert decision.replicas == 4


def test_the_last_one_goes_when_nobody_is_there():
    assert after(SLEEPY, 599, Observation(1, busy(1, 0))) == 1
    assert after(SLEEPY, 600, Observation(1, busy(1, 0))) == 0
    assert after(SLEEPY, 3000, Observation(1, busy(1, 0.1))) == 1
    assert after(LIMITS, 3000, Observation(1, busy(1, 0))) == 1


def test_a_replica_that_says_nothing_lets_none_go():
    assert after(SLEEPY, 3000, Observation(1, (None,))) == 1
    assert after(LIMITS, 3000, Observation(4, (*busy(3, 0), None))) == 4
    # What cannot start, for want of a host, is another matter.
    assert after(LIMITS, 3000, Observation(4, busy(3, 0))) == 2


def test_changed_limits_are_kept_at_once():
    assert decide(Observation(40, busy(40, 64)), LIMITS, State(), 0.0).replicas == 32
    assert decide(Observation(0), LIMITS, State(), 0.0).replicas == 1


# Traces.

BURST = [2.0] * 600 + [40.0] * 900 + [2.0] * 2700
DIURNAL = [2.0 + 19.0 * (1.0 - math.cos(2.0 * math.pi * second / 14400)) for second in range(14400)]
FLAPPING = [(500 if second // 60 % 2 == 0 else 2000) / ENGINE.service_s for second in range(3600)]
WIDE = dataclasses.replace(LIMITS, max_replicas=128)


class RaysDefault:
    """Ray Serve's default policy with its factors and delays, which Serve applies around any policy."""

    def __init__(self, limits: Limits, upscaling_factor: float = 1.0) -> None:
        from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
        from ray.serve.config import AutoscalingConfig

        self._policy = replica_queue_length_autoscaling_policy
        self._limits = limits
        self._factor = upscaling_factor
        self._config = AutoscalingConfig(target_ongoing_requests=limits.target_ongoing_requests)
        self._since: tuple[bool, float] | None = None

    def __call__(self, seen: Observation, now: float) -> int:
        from ray.serve.config import AutoscalingContext

        total = seen.held + sum(load.running + load.queued for load in seen.replicas if load is not None)
        absent = dict.fromkeys(("running_replicas", "raw_metrics", "aggregated_metrics", "last_scale_up_time"))
        absent |= dict.fromkeys(("deployment_id", "deployment_name", "app_name", "last_scale_down_time"))
        context = AutoscalingContext(
            **absent, current_num_replicas=len(seen.replicas), target_num_replicas=seen.target, total_num_requests=total,
            total_queued_requests=seen.held, capacity_adjusted_min_replicas=self._limits.min_replicas,
            capacity_adjusted_max_replicas=self._limits.max_replicas, policy_state={}, current_time=now, config=self._config,
        )  # fmt: skip
        wanted, _ = self._policy(context)
        change = wanted - len(seen.replicas)
        wanted = math.ceil(len(seen.replicas) + change * (self._factor if change > 0 else 1.0))
        if wanted == seen.target:
            self._since = None
            return seen.target
        up = wanted > seen.target
        if self._since is None or self._since[0] != up:
            self._since = (up, now)
        if now - self._since[1] < (self._limits.upscale_delay_s if up else self._limits.downscale_delay_s):
            return seen.target
        self._since = None
        return self._limits.clamp(wanted)


@pytest.mark.parametrize(
    ("name", "rates", "limits", "moves", "factor", "wait_s"),
    [
        ("burst", BURST, LIMITS, 16, 2.1, 60),
        ("diurnal", DIURNAL, LIMITS, 20, 1.3, 0),
        ("500 to 2000", FLAPPING, WIDE, 14, 2.4, 30),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_traces(name: str, rates: list[float], limits: Limits, moves: int, factor: float, wait_s: int):
    """One rise and one fall each: at most one turn, no more replica-seconds than stated, hardly any wait."""
    for seed in range(3):
        began = time.process_time()
        run = simulate(arrivals(rates, seed), rates, Ours(limits), limits, ENGINE)
        spent_ms = (time.process_time() - began) * 1000
        if seed == 0:
            print(f"\n{run.line(name)} {spent_ms:.0f} ms\n{_rays(rates, limits).line(name + ', Ray')}", end="")
        assert run.turns <= 1 and run.moves <= moves, run.line(name)
        assert run.factor <= factor and run.wait_s(0.95) <= wait_s, run.line(name)


def _rays(rates: list[float], limits: Limits) -> Run:
    return simulate(arrivals(rates), rates, RaysDefault(limits), limits, ENGINE)


def steady(policy: Policy, in_flight: float, start: int, seconds: int, seed: int = 0) -> Run:
    """Targets under a load that does not change but for chance; replicas come at once."""
    generator, run, target = np.random.default_rng(seed), Run(), start
    samples = generator.poisson(in_flight, seconds + 6)
    for now in range(seconds):
        each = float(samples[now : now + 6].mean()) / max(1, target)
        target = policy(Observation(target, (ReplicaLoad(each),) * target), float(now))
        run.targets.append(target)
    return run


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_the_settings_of_ray_issue_63279():
    """A tenth of a request per replica and every upward step ten times as large: Serve goes to and fro between 500 and 2000."""
    limits = Limits(50, 2000, 0.1, upscale_delay_s=5, downscale_delay_s=30, downscale_to_zero_delay_s=30)
    rays = steady(RaysDefault(limits, upscaling_factor=10.0), 50.0, 500, 900)
    ours = steady(Ours(limits), 50.0, 500, 900)
    print(
        f"\nturns in 15 min: {rays.turns} (Ray, up to {max(rays.targets)}), {ours.turns} (ours, up to {max(ours.targets)})",
        end="",
    )
    assert rays.turns >= 10 and ours.turns == 0
    assert max(ours.targets) <= 1.3 * 500


def shapes(rng: random.Random) -> list[float]:
    """Pieces of calm, ramp, peak and silence, a quarter of an hour to an hour and a half."""
    rates: list[float] = []
    while len(rates) < 900 or (len(rates) < 5400 and rng.random() < 0.8):
        begin = rates[-1] if rates else 2.0
        end = rng.choice([0.0, 1.0, rng.uniform(0, 60), rng.uniform(0, 200)])
        ramp, hold = rng.choice([1, 30, 300]), rng.randrange(30, 600)
        rates += [begin + (end - begin) * step / ramp for step in range(1, ramp + 1)] + [end] * hold
    return rates


@pytest.mark.parametrize("seed", range(12))
def test_random_traces_stay_within_limits_and_settle(seed: int):
    """The simulator asserts the limits each second. After the trace the load is constant: nobody waits, and nothing changes."""
    rng = random.Random(seed)
    low = rng.choice([0, 1, 3])
    limits = Limits(low, rng.randrange(low + 30, 80), 48, rng.choice([0.0, 5.0, 30.0]), rng.choice([30.0, 300.0]), 600.0)
    engine = dataclasses.replace(ENGINE, boot_s=rng.choice([5, 60, 180]))
    last = rng.uniform(1.0, 0.9 * limits.max_replicas * engine.slots / engine.service_s * 0.75)
    rates = [*shapes(rng), *[last] * 5400]
    run = simulate(arrivals(rates, seed), rates, Ours(limits), limits, engine, start=low)
    settled = run.targets[-1800:]
    assert len(set(settled)) <= 2, f"still moving: {sorted(set(settled))}"
    needed = limits.clamp(math.ceil(last * engine.service_s / limits.target_ongoing_requests))
    assert needed - 1 <= settled[-1] <= math.ceil(needed / 0.8) + 2, (needed, settled[-1])


@pytest.mark.parametrize("in_flight", [3.0, 40.0, 47.5, 96.0, 700.0])
def test_noise_alone_never_turns_it(in_flight: float):
    for seed in range(5):
        run = steady(Ours(dataclasses.replace(LIMITS, downscale_delay_s=30)), in_flight, 1, 3600, seed)
        assert run.turns == 0, run.targets


def test_it_is_quick():
    ours: Callable[[Observation, float], int] = Ours(LIMITS)
    seen = Observation(32, busy(32, 40, queued=1.0, kv_use=0.5, ttft_s=0.2, service_s=9.0))
    began = time.process_time()
    for now in range(1000):
        ours(seen, float(now))
    assert time.process_time() - began < 0.5
