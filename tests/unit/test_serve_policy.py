"""From an engine's registry to Serve's context to a decision, with the real classes of each library; Ray does not run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, NamedTuple

import cloudpickle
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.config import ModelConfig
from serve_apps.autoscale import Observation, ReplicaLoad, State
from serve_apps.engine_load import HEARD_S, EngineLoad
from serve_apps.metering import Meter
from serve_apps.serve_policy import STALE_S, ReplicaPolicy, observe, scaling_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
MODEL = ModelConfig.model_validate(
    {
        "id": "m",
        "max_ongoing_requests": 4,
        "autoscaling": {"min_replicas": 0, "max_replicas": 3, "upscale_delay_s": 0, "downscale_delay_s": 9, "target_ttft_s": 2.0},
    }
)


class Vllm:
    """vLLM's metrics of one engine, by their names, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.waiting = Gauge("vllm:num_requests_waiting", "", ["engine"], registry=self.registry).labels("0")
        self.kv_use = Gauge("vllm:kv_cache_usage_perc", "", ["engine"], registry=self.registry).labels("0")
        self.ttft = Histogram("vllm:time_to_first_token_seconds", "", ["engine"], registry=self.registry).labels("0")
        self.whole = Histogram("vllm:e2e_request_latency_seconds", "", ["engine"], registry=self.registry).labels("0")
        Counter("vllm:generation_tokens", "Not ours.", registry=self.registry).inc(7)


def test_an_engine_tells_what_happened_since_the_last_look():
    vllm, meter, now = Vllm(), Meter(running=4), [0.0]
    load = EngineLoad(meter, vllm.registry, lambda: now[0])
    assert load.figures() == {"running": 4, "waiting": 0, "queued": 0, "kv_use": 0}
    vllm.waiting.set(1)
    vllm.kv_use.set(0.4)
    for seconds in (1.0, 3.0):
        vllm.ttft.observe(seconds)
        vllm.whole.observe(10 * seconds)
    load.heard(b"0.500")
    load.heard(b"1.000")
    whole = {"running": 3, "waiting": 1, "queued": 3.0, "kv_use": 0.4}
    assert load.figures() == {**whole, "ttft_s": 2.0, "service_s": 20.0}
    now[0] = HEARD_S
    assert load.figures() == whole, "nothing new; what gateways said last still holds"
    now[0] = HEARD_S + 1
    assert load.figures()["queued"] == 0


def test_an_idle_engine_is_idle_whatever_its_gauges_remember():
    vllm, meter = Vllm(), Meter()
    vllm.waiting.set(2)
    vllm.kv_use.set(0.7)
    load = EngineLoad(meter, vllm.registry)
    load.heard(b"3.000")
    assert load.figures() == {"running": 0, "waiting": 0, "queued": 0, "kv_use": 0}
    meter.began()
    meter.produced(5)
    meter.running -= 1
    assert 0 < load.figures()["running"] < 1, "one came and went"
    assert load.figures()["running"] == 0


def test_an_engine_without_statistics_still_tells_its_requests():
    load = EngineLoad(Meter(running=3), CollectorRegistry())
    assert load.figures() == {"running": 3, "waiting": 0, "queued": 0, "kv_use": 0}


class Point(NamedTuple):
    """As Serve keeps a figure: two attributes."""

    timestamp: float
    value: float


def context(raw: dict[str, dict[str, list[tuple[float, float]]]], running: list[str], target: int, **more: Any) -> Any:
    """Serve's context; `raw` is figure, replica, then (time, value)."""
    from ray.serve.config import AutoscalingContext

    series = {
        figure: {name: [Point(at, value) for at, value in points] for name, points in replicas.items()}
        for figure, replicas in raw.items()
    }
    fields: dict[str, Any] = {
        "deployment_id": None, "deployment_name": "EngineServer:m", "app_name": "engine-m",
        "current_num_replicas": len(running), "target_num_replicas": target, "running_replicas": running,
        "total_num_requests": 0.0, "total_queued_requests": 0.0, "aggregated_metrics": None, "raw_metrics": lambda: series,
        "capacity_adjusted_min_replicas": 0, "capacity_adjusted_max_replicas": 3, "policy_state": {},
        "last_scale_up_time": None, "last_scale_down_time": None, "current_time": 1000.0, "config": None,
    }  # fmt: skip
    return AutoscalingContext(**{**fields, **more})


def test_serves_context_is_read():
    raw = {
        "running_requests": {"a": [(999.0, 70.0)]},
        "running": {"a": [(997.0, 2.0), (999.0, 4.0)], "b": [(1000.0 - STALE_S - 1, 9.0)]},
        "queued": {"a": [(997.0, 1.0), (999.0, 2.0)]},
        "ttft_s": {"a": [(997.0, 0.5)]},
    }
    seen = observe(context(raw, ["a", "b", "c"], 4, total_queued_requests=5.0))
    assert seen == Observation(4, (ReplicaLoad(running=3.0, queued=1.5, ttft_s=0.5), None, None), held=0.0)
    assert observe(context({}, [], 0, total_queued_requests=5.0)) == Observation(0, (), held=5.0)


def policy() -> ReplicaPolicy:
    """As Serve gets it: made from the configuration, through the wire."""
    from ray.serve.config import AutoscalingConfig

    config = AutoscalingConfig(**json.loads(json.dumps(scaling_config(MODEL))))
    made: ReplicaPolicy = config.policy.get_policy()(**config.policy.policy_kwargs)
    return made


def test_serve_takes_the_policy_and_adds_no_delay_of_its_own():
    from ray.serve.config import AutoscalingConfig

    config = AutoscalingConfig(**scaling_config(MODEL))
    assert (config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s) == (0, 0, 0)
    assert config.policy.policy_kwargs["downscale_delay_s"] == 9 and config.policy.policy_kwargs["target_ttft_s"] == 2.0
    assert config.policy.policy_function == "serve_apps.serve_policy:ReplicaPolicy"


def test_a_decision_and_its_state_go_through_serve():
    ask = policy()
    full = {"running": {"a": [(999.0, 4.0)]}, "queued": {"a": [(999.0, 3.0)]}}
    wanted, state = ask(context(full, ["a"], 1))
    assert wanted == 3 and state
    idle = {"running": {name: [(999.0, 0.0)] for name in "abc"}}
    wanted, state = ask(context(idle, ["a", "b", "c"], 3, policy_state=state))
    assert wanted == 3 and cloudpickle.loads(cloudpickle.dumps(state)).keys() == state.keys()
    assert ask(context({}, ["a"], 1, policy_state=state))[0] == 1


@pytest.mark.parametrize(
    "broken",
    [
        {"running": {"a": [(999.0, float("nan"))]}},
        {"running": {"a": [(999.0, float("inf"))]}},
        {"running": {"a": [(999.0, "four")]}},
        {"running": None},
    ],
)
def test_figures_that_make_no_sense_change_nothing(broken):
    ask = policy()
    raw = {
        figure: {name: [Point(*point) for point in points] for name, points in (replicas or {}).items()} or None
        for figure, replicas in broken.items()
    }
    kept = State(low_since=1.0)
    wanted, state = ask(context({}, ["a"], 2, raw_metrics=raw, policy_state={"tidepool_state": kept}))
    assert wanted == 2 and state["tidepool_state"] == kept
    assert ask(context({}, ["a"], 2, raw_metrics=raw, policy_state=state)) == (2, state)


def test_the_controller_imports_neither_vllm_nor_torch():
    code = "import sys, serve_apps.serve_policy; print(sorted({'vllm', 'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
