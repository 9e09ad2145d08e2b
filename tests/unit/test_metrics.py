"""Our own metrics before Ray sees them: series that begin at 0, what is mirrored by which name, lost nodes, a run's figures."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.database import default_url
from cluster.metrics import EXPECTED_STATUSES, GatewayMetrics
from cluster.store import Store
from serve_apps import exporter
from serve_apps.exporter import Mirror
from serve_apps.sync import LocalStore, Syncer
from train.gauges import AT, RunGauges, figures


def test_an_expected_model_has_its_series_from_the_start():
    metrics = GatewayMetrics()
    metrics.expect("chat", 2)
    value = metrics.registry.get_sample_value
    for status in EXPECTED_STATUSES:
        assert value("tidepool_requests_total", {"model": "chat", "status": status}) == 0
    for name in (
        "cost_usd_total",
        "retries_total",
        "cancelled_requests_total",
        "running_requests",
        "queued_requests",
        "engine_replicas",
    ):
        assert value(f"tidepool_{name}", {"model": "chat"}) == 0, name
    for kind in ("prompt", "completion", "cached"):
        assert value("tidepool_tokens_total", {"model": "chat", "kind": kind}) == 0
    assert value("tidepool_ttft_seconds_bucket", {"model": "chat", "le": "+Inf"}) == 0
    assert value("tidepool_latency_seconds_count", {"model": "chat"}) == 0
    assert value("tidepool_engine_replicas_min", {"model": "chat"}) == 2


def test_a_request_is_counted_once_everywhere():
    metrics = GatewayMetrics()
    metrics.expect("chat", 1)
    metrics.count("chat", 200, (10, 5, 2), 0.25, 3.0, 0.4)
    metrics.count("chat", 499, (10, 0, 0), 0.5, 1.0, 0.0)  # its client left before the first byte
    value = metrics.registry.get_sample_value
    assert value("tidepool_requests_total", {"model": "chat", "status": "200"}) == 1
    assert value("tidepool_requests_total", {"model": "chat", "status": "499"}) == 1
    assert [value("tidepool_tokens_total", {"model": "chat", "kind": kind}) for kind in ("prompt", "completion", "cached")] == [
        20,
        5,
        2,
    ]
    assert value("tidepool_cost_usd_total", {"model": "chat"}) == 0.75
    assert value("tidepool_latency_seconds_sum", {"model": "chat"}) == 4.0
    assert value("tidepool_ttft_seconds_count", {"model": "chat"}) == 1
    assert value("tidepool_ttft_seconds_bucket", {"model": "chat", "le": "0.5"}) == 1
    assert value("tidepool_ttft_seconds_bucket", {"model": "chat", "le": "0.25"}) == 0


def test_only_models_of_the_configuration_are_counted():
    with pytest.raises(KeyError):
        GatewayMetrics().count("invented-by-a-client", 200, (1, 1, 0), 0.0, 1.0, 0.1)


def test_a_mirror_shows_every_sample_with_its_own_labels_and_ours():
    registry = CollectorRegistry()
    Counter("asked", "Asked.", ["model"], registry=registry).labels("m").inc(3)
    Gauge("now", "Now.", registry=registry).set(7)
    Histogram("took", "Took.", buckets=(1.0,), registry=registry).observe(0.5)
    shown = {
        (name, tuple(sorted(labels.items()))): value for name, _, labels, value in Mirror(registry, {"replica": "r"}).samples()
    }
    ours = ("replica", "r")
    assert shown == {
        ("asked_total", (("model", "m"), ours)): 3,
        ("now", (ours,)): 7,
        ("took_bucket", (("le", "1.0"), ours)): 1,
        ("took_bucket", (("le", "+Inf"), ours)): 1,
        ("took_count", (ours,)): 1,
        ("took_sum", (ours,)): 0.5,
    }


def test_a_mirror_with_names_shows_those_only_under_the_other_name():
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Running.", ["model_name", "engine"], registry=registry).labels("folder", "0").set(4)
    Gauge("vllm:other", "Other.", registry=registry).set(1)
    mirror = Mirror(registry, {"model": "chat"}, exporter.ENGINE_NAMES, drop=("model_name",))
    (sample,) = mirror.samples()
    assert sample == ("tidepool_engine_running", "Running.", {"engine": "0", "model": "chat"}, 4)
    mirror.push()  # in a process without a cluster it goes nowhere, and fails nothing


def test_nodes_that_were_told_to_go_are_not_lost():
    reasons = {"UNSPECIFIED": 0, "EXPECTED": 1, "UNEXPECTED": 2, "PREEMPTED": 3, "IDLE": 4}
    dead = [{"Alive": False, "DeathReason": reason} for reason in reasons.values()]
    assert exporter.lost_nodes([{"Alive": True, "DeathReason": 0}, *dead]) == 2
    assert exporter.lost_nodes([]) == 0


def test_the_reasons_of_death_are_ray_s():
    from ray.core.generated.common_pb2 import NodeDeathInfo

    names = {number: name for name, number in NodeDeathInfo.Reason.items()}
    assert [names[reason] for reason in exporter.LOST] == ["UNEXPECTED_TERMINATION", "AUTOSCALER_DRAIN_PREEMPTED"]


def test_the_age_of_the_store_s_last_answer(tmp_path):
    async def test() -> None:
        store = Store(default_url(tmp_path))
        syncer = Syncer(LocalStore(store), 0.5)
        before = syncer.age_s
        assert before == pytest.approx(time.monotonic(), abs=1.0)  # never answered
        await syncer.sync()
        young = syncer.age_s
        assert young < 1.0 <= before
        await asyncio.to_thread(store.usage)
        assert syncer.age_s > young
        store.close()

    asyncio.run(test())


def test_a_step_s_figures_are_what_it_has():
    line = {"step": 3, "loss": 1.5, "lr": 1e-4, "grad_norm": None, "seconds": 2.0}
    assert figures(line, 100.0) == {"step": 3.0, "loss": 1.5, "lr": 1e-4, AT: 100.0}


def test_a_run_s_gauges_are_repeated_until_it_is_over():
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "gauges"}

    before = threads()
    gauges = RunGauges("run")
    gauges.show({"step": 1, "loss": 2.0})
    gauges.show({"step": 2, "loss": 1.0})
    (repeats,) = threads() - before
    gauges.close()
    repeats.join(timeout=5)
    assert not repeats.is_alive()
