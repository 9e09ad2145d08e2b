"""A real Prometheus beside the live cluster, with our files: all it asks for is there. Debian's package, on loopback.

It scrapes while requests are answered and a training run shows its figures. Without the package the tests are skipped; in CI they
fail.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import client
import promql
import pytest
from conftest import CONFIG, ROOT, Endpoint, cluster_command

from cluster.preflight import free_port

LIMIT_S = 120.0
# Only a machine with a GPU has these; that Ray's agent knows the names is checked in its source.
WITH_GPU = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available", "state:tidepool_gpus:sum"}
# Asked with `> 0`: in a cluster without a pending node the answer is empty.
MAY_BE_EMPTY = {"sum by (NodeType) (autoscaler_pending_nodes) > 0"}
# A run's gauges as `train.log` sets them, without the minutes that a run takes; one run ends when it was seen.
RUNS = """
import sys, time
from pathlib import Path
import ray

@ray.remote(num_cpus=0)
def runs(folder):
    from train.gauges import KEYS, RunGauges
    ended, goes_on = RunGauges("ended"), RunGauges("goes-on")
    for gauges in (ended, goes_on):
        gauges.show(dict.fromkeys(KEYS, 3.0))
    end = time.monotonic() + 200
    while not (folder / "seen").exists() and time.monotonic() < end:
        time.sleep(0.2)
    ended.close()
    while not (folder / "stop").exists() and time.monotonic() < end:
        time.sleep(0.2)
    goes_on.close()

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
ray.get(runs.remote(Path(sys.argv[2])))
"""


@dataclass(frozen=True)
class Prometheus:
    """The server's HTTP API."""

    url: str

    def get(self, path: str, **query: str) -> Any:
        with urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def names(self) -> set[str]:
        return set(self.get("label/__name__/values"))


def until(what: str, missing: Callable[[], Any], meanwhile: Callable[[], Any] = lambda: None) -> None:
    """Wait for nothing to be missing any more."""
    end = time.monotonic() + LIMIT_S
    while left := missing():
        assert time.monotonic() < end, f"{what} after {LIMIT_S:.0f} s: {left}"
        meanwhile()
        time.sleep(0.5)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def prometheus(endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        missing = "Prometheus is not installed: apt-get install prometheus"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("prometheus")
    # The autoscaler of a cluster on one machine knows this node type, with no node of it.
    manifest = folder / "manifest.yaml"
    manifest.write_text("available_node_types: {ray.head.default: {node_config: {price_per_hour: 1.5}}}")
    served = ["--run-dir", str(endpoint.run_dir), "--set", f"node.port={urllib.parse.urlsplit(endpoint.root).port}"]
    written = cluster_command("prometheus", str(CONFIG), *served, "--manifest", str(manifest), "--budget", "10")
    assert written.returncode == 0, written.stderr

    address = f"127.0.0.1:{free_port()}"
    command = [
        f"--web.listen-address={address}" if "web.listen" in word else word
        for word in shlex.split(written.stdout.splitlines()[0])
    ]
    environ = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(endpoint.run_dir / "ray_token")}
    environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    gcs = (endpoint.run_dir / "ray" / "ray_current_cluster").read_text().strip()
    log = folder / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
        runs = subprocess.Popen(
            [sys.executable, "-c", RUNS, gcs, str(folder)], cwd=ROOT, env=environ, stdout=output, stderr=output
        )
    try:

        def silent() -> bool:
            assert server.poll() is None, log.read_text()
            return not answers(f"http://{address}/-/ready")

        until("Prometheus does not answer", silent)
        prometheus = Prometheus(f"http://{address}")
        until("a run is not shown", lambda: not prometheus.query("ray_tidepool_train_step{run='ended'}"))
        (folder / "seen").touch()
        yield prometheus
    finally:
        (folder / "seen").touch()
        (folder / "stop").touch()
        server.terminate()
        server.wait(timeout=30)
        runs.wait(timeout=60)
        print(log.read_text()[-3000:])
        shutil.rmtree(endpoint.run_dir / "prometheus" / "data", ignore_errors=True)


def ask(endpoint: Endpoint) -> None:
    """A request whose prompt is in the prefix cache from the second time on, with several tokens."""
    answer = client.chat(endpoint.root, endpoint.api_key, "Say something long. " * 20, max_tokens=8, ignore_eos=True)
    assert answer.status == 200, answer


def test_every_metric_that_is_asked_for_is_there(prometheus: Prometheus, endpoint: Endpoint) -> None:
    wanted = promql.named() - WITH_GPU
    until("not in Prometheus", lambda: wanted - prometheus.names(), lambda: ask(endpoint))


def test_names_that_need_a_gpu_are_ray_s(prometheus: Prometheus) -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    agent = (Path(spec.origin).parent / "dashboard/modules/reporter/reporter_agent.py").read_text()
    for name in WITH_GPU - {"state:tidepool_gpus:sum"}:
        assert f'"{name.removeprefix("ray_")}"' in agent, name
    # And the rule's source has what it takes, but for a GPU.
    assert {sample["metric"]["State"] for sample in prometheus.query('ray_resources{Name="CPU"}')} == {"AVAILABLE", "USED"}


def test_all_targets_are_scraped(prometheus: Prometheus) -> None:
    targets = prometheus.get("targets")["activeTargets"]
    assert {target["health"] for target in targets} == {"up"}, [target["lastError"] for target in targets]
    jobs = [target["labels"]["job"] for target in targets]
    assert jobs.count("endpoint") == 1 and jobs.count("ray") >= 3, jobs  # a node's agent, the dashboard, the autoscaler


def test_every_panel_shows_something(prometheus: Prometheus, endpoint: Endpoint) -> None:
    asked = {panel for file in promql.DASHBOARDS for panel in promql.panels(file)}
    shown = {(title, expression) for title, expression in asked if not promql.metrics(expression) & WITH_GPU}
    shown = {(title, expression) for title, expression in shown if expression not in MAY_BE_EMPTY}
    assert len(shown) > 40

    def empty() -> list[str]:
        return [f"{title}: {expression}" for title, expression in shown if not prometheus.query(expression)]

    until("panels without data", empty, lambda: ask(endpoint))
    for _, expression in asked - shown:
        prometheus.query(expression)  # empty, and no error


def test_every_rule_is_evaluated_and_a_healthy_cluster_alerts_nobody(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} >= {rule.get("alert") or rule["record"] for rule in promql.rules("alerts.yml")}
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


def test_counts_are_exact_across_gateways(prometheus: Prometheus, endpoint: Endpoint) -> None:
    """What all gateways counted, as far as it is scraped, is what was asked; one more request is one more."""
    total = f'sum(ray_tidepool_requests_total{{model="{client.CHAT}", status="200"}})'

    def counted() -> float:
        return float(prometheus.query(total)[0]["value"][1])

    def own() -> float:
        """The gateways' own numbers, as the endpoint shows them in turn."""
        found: dict[str, float] = {}
        token = (endpoint.run_dir / "metrics_token").read_text().strip()
        for _ in range(12):
            text = client.request(endpoint.root, "GET", "/metrics", token).body.decode()
            created = re.search(rf'^tidepool_ttft_seconds_created{{model="{client.CHAT}"}} (\S+)$', text, re.MULTILINE)
            count = re.search(rf'^tidepool_requests_total{{model="{client.CHAT}",status="200"}} (\S+)$', text, re.MULTILINE)
            assert created and count
            found[created[1]] = float(count[1])
        assert len(found) == len(prometheus.query("ray_tidepool_store_age_seconds")), "not every gateway answered"
        return sum(found.values())

    ask(endpoint)
    until("the counts differ", lambda: counted() != own())


def test_the_series_of_a_run_end_with_it(prometheus: Prometheus) -> None:
    step = "ray_tidepool_train_step{run='%s'}"
    until("a run that ended is shown", lambda: prometheus.query(step % "ended"))
    assert prometheus.query(f"max_over_time({step % 'ended'}[10m])"), "it never was"
    assert prometheus.query(step % "goes-on")
