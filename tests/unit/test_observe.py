"""What the answers of a live cluster mean: `data/cluster_answers.json`, recorded from one with a model awake, one asleep, others
that only pretend on logical GPUs, training on two, an actor and a task on one each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import observe
from cluster.config import parse
from cluster.deploy import Answer

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "cluster_answers.json").read_text())
NOW = 1795773901.0
CHAT, EMBED = "tidepool-chat", "tidepool-embed"
CONFIG = parse({"models": [{"id": CHAT, "device": "cpu"}, {"id": EMBED, "device": "cpu", "task": "embed"}]})
SILENT = [Answer(0, b"refused"), Answer(500, b"{}"), Answer(200, b"<html>"), Answer(200, b"[]"), Answer(200, b'{"data": null}')]


def answer(name: str) -> Answer:
    return Answer(200, json.dumps(RECORDED[name]).encode())


def rows(name: str) -> list[dict[str, Any]]:
    found = observe.listed(answer(name))
    assert found
    return found


def scraped(name: str) -> list[observe.Sample]:
    return observe.samples("\n".join(RECORDED[name]).encode())


def test_nodes():
    alive, gone = observe.nodes(rows("nodes"), {}, NOW)
    assert gone == 0 and len(alive) == 1
    node = alive[0]
    assert (node.name, node.kind, node.head, node.cpus, node.gpus) == ("127.0.0.1", None, True, 16, 8)
    assert node.uptime_s == pytest.approx(187, abs=1) and node.usd_per_hour is None
    assert observe.cost(alive) == (None, ())


def test_nodes_of_a_manifest_have_types_and_prices():
    head = rows("nodes")[0]
    gpu = {"state": "ALIVE", "node_ip": "10.0.0.2", "resources_total": {"GPU": 1.0}, "labels": {observe.NODE_TYPE: "gpu-l4"}}
    unknown = {**gpu, "node_ip": "10.0.0.3", "labels": {observe.NODE_TYPE: "exotic"}}
    data = [gpu, unknown, {**gpu, "state": "DEAD"}, {**head, "labels": {observe.NODE_TYPE: "head"}}]
    alive, gone = observe.nodes(data, {"head": 0.2, "gpu-l4": 0.8}, NOW)
    assert [(node.name, node.kind) for node in alive] == [("127.0.0.1", "head"), ("10.0.0.3", "exotic"), ("10.0.0.2", "gpu-l4")]
    assert gone == 1 and observe.cost(alive) == (1.0, ("exotic",))


def test_gpus_by_who_holds_them():
    alive, _ = observe.nodes(rows("nodes"), {}, NOW)
    held = observe.gpus(alive, rows("actors"), rows("placement_groups"), rows("tasks"))
    # A replica, and a replica's group; two workers of Ray Train; an actor and a task.
    assert held == observe.Gpus(total=8, serving=2, training=2, other=2) and held.idle == 2


def test_gpus_of_what_is_gone_are_idle():
    alive, _ = observe.nodes(rows("nodes"), {}, NOW)
    dead = [{**actor, "state": "DEAD"} for actor in rows("actors")]
    assert observe.gpus(alive, dead, [], []).idle == 8


def test_applications():
    apps = observe.applications(answer("serve"))
    assert apps is not None
    assert apps["gateway"] == observe.Application("gateway", "running", 1, 1)
    assert apps[f"engine-{CHAT}"] == observe.Application(f"engine-{CHAT}", "running", 1, 1)
    assert apps[f"engine-{EMBED}"] == observe.Application(f"engine-{EMBED}", "asleep", 0, 0)


def test_an_application_that_failed_says_why():
    message = "Traceback\n  File x\nValueError: too little memory\n"
    failed = {"applications": {"engine-m": {"status": "DEPLOY_FAILED", "message": message, "deployments": {}}}}
    apps = observe.applications(Answer(200, json.dumps(failed).encode()))
    assert apps == {"engine-m": observe.Application("engine-m", "deploy failed", 0, None, "ValueError: too little memory")}


def test_models():
    apps = observe.applications(answer("serve"))
    agents = scraped("agents")
    agents += [observe.Sample("ray_tidepool_engine_tokens_per_second", {"model": CHAT, "replica": name}, 50.5) for name in "ab"]
    chat, embed = observe.models(CONFIG.models, apps, scraped("gateway"), agents)
    assert (chat.application.name, chat.application.state, chat.running, chat.queued) == (CHAT, "running", 1, 0)
    assert chat.tokens_per_s == 101 and chat.kv_use == pytest.approx(0.0044, abs=1e-4)
    assert (embed.application.state, embed.running, embed.queued, embed.kv_use) == ("asleep", 0, 0, None)


def test_several_gateways_add_up():
    twice = scraped("gateway") * 2
    assert observe.models(CONFIG.models, None, twice, None)[0].running == 2


def test_a_model_that_nobody_knows_of():
    (chat, _) = observe.models(CONFIG.models, {}, None, None)
    assert (chat.application.state, chat.running, chat.queued, chat.tokens_per_s, chat.kv_use) == (
        "missing",
        None,
        None,
        0.0,
        None,
    )


def test_jobs():
    found = observe.jobs(answer("jobs"), rows("actors"), scraped("agents"), NOW)
    assert found is not None
    sample, running, failed = found  # the driver that made the keys has ended and is of no interest
    assert (sample.name, sample.kind, sample.state, sample.step, sample.tokens_per_s) == (
        "sample",
        "training",
        "running",
        7,
        123.5,
    )
    assert (running.name, running.kind, running.state) == ("pretend2", "job", "running")
    assert running.age_s == pytest.approx(45, abs=1)
    assert (failed.name, failed.state) == ("pretend", "failed")
    later = observe.jobs(answer("jobs"), [], [], NOW + 7200)
    assert later is not None and [job.name for job in later] == ["pretend2"]


def test_a_run_that_waits_and_a_driver():
    waiting = {"state": "RESTARTING", "name": "tidepool-train-first", "ray_namespace": "tidepool-train"}
    driver = {
        "type": "DRIVER",
        "status": "RUNNING",
        "entrypoint": "/v/bin/python3 -m train sft secret=1",
        "start_time": NOW * 1000,
    }
    found = observe.jobs(Answer(200, json.dumps([driver]).encode()), [waiting], None, NOW)
    assert found == (observe.Job("first", "training", "restarting"), observe.Job("-m train sft", "driver", "running", 0.0))


def test_where_agents_are_and_nodes_on_their_way():
    assert observe.targets(answer("sd")) == ["127.0.0.1:34579", "127.0.0.1:36687", "127.0.0.1:44107"]
    assert observe.starting(scraped("agents")) == () == observe.starting(None)
    coming = observe.samples(b'autoscaler_pending_nodes{NodeType="gpu-l4",SessionName="s"} 2.0\n')
    assert observe.starting(coming) == (("gpu-l4", 2),)


@pytest.mark.parametrize("silent", SILENT)
def test_who_does_not_answer_is_unknown(silent):
    assert observe.listed(silent) is None and observe.applications(silent) is None
    assert observe.targets(silent) in (None, [])
    if silent.body != b"[]":
        assert observe.jobs(silent, None, None, NOW) is None
    assert observe.samples(silent.body) == []


def test_names_with_anything_in_them_survive():
    (sample,) = observe.samples(b'tidepool_x{model="a\\"b,c}",z="1"} 3.5e1\ntidepool_y{ 7\n# tidepool_z 1')
    assert sample.labels["model"] == 'a\\"b,c}' and sample.value == 35
