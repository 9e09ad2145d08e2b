"""Monitoring files: valid, each alert fires and has its runbook entry, dashboards are whole; what is written for a cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql
import pytest
import yaml

from cluster.__main__ import main
from cluster.config import load
from cluster.prometheus import cost_rules, endpoint_target, node_prices

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).with_name("data") / "alerts.yml"
ALERTS = {rule["alert"]: rule for rule in promql.rules("alerts.yml")}
LOCAL = ROOT / "configs" / "local-cpu.yaml"


def promtool(*words: str | Path) -> str:
    """What it printed; the test is skipped where it is not installed, in CI it fails."""
    if shutil.which("promtool") is None:
        missing = "promtool is not installed: apt-get install prometheus"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_written_for_a_cluster_is_valid(tmp_path, capsys):
    manifest = tmp_path / "cluster.yaml"
    manifest.write_text(
        "available_node_types: {head: {node_config: {price_per_hour: 0.1}}, gpu: {node_config: {price_per_hour: 4}}}\n"
    )
    run_dir = tmp_path / "run"
    command = ["prometheus", str(LOCAL), "--run-dir", str(run_dir), "--manifest", str(manifest), "--budget", "12.5"]
    assert main(command) == 0
    prometheus, grafana = capsys.readouterr().out.splitlines()
    assert f"--config.file={run_dir}/prometheus/prometheus.yml" in prometheus
    assert f"GF_PATHS_PROVISIONING={run_dir}/grafana/provisioning" in grafana

    # What `up` makes, so that promtool finds everything that the file leads to.
    (run_dir / "metrics_token").write_text("token")
    (run_dir / "ray").mkdir()
    (run_dir / "ray" / "prom_metrics_service_discovery.json").write_text(
        '[{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1"]}]'
    )
    printed = promtool("check", "config", run_dir / "prometheus" / "prometheus.yml")
    assert "WARNING" not in printed and printed.count("SUCCESS") == 5, printed

    provider = yaml.safe_load((run_dir / "grafana/provisioning/dashboards/tidepool.yaml").read_text())["providers"][0]
    assert {path.name for path in Path(provider["options"]["path"]).iterdir()} == {path.name for path in promql.DASHBOARDS}
    sources = yaml.safe_load((run_dir / "grafana/provisioning/datasources/tidepool.yaml").read_text())["datasources"]
    assert [source["type"] for source in sources] == ["prometheus"]


def test_again_replaces_our_files_and_leaves_the_rest(tmp_path, capsys):
    command = ["prometheus", str(LOCAL), "--run-dir", str(tmp_path)]
    assert main([*command, "--budget", "3"]) == 0
    (tmp_path / "prometheus" / "data").mkdir()
    (tmp_path / "prometheus" / "alerts.yml").write_text("groups: []")
    assert main(command) == 0
    assert "EndpointDown" in (tmp_path / "prometheus" / "alerts.yml").read_text()
    assert "budget" not in (tmp_path / "prometheus" / "costs.yml").read_text()
    assert (tmp_path / "prometheus" / "data").is_dir()


@pytest.mark.parametrize(
    "text", ["", "a: [", "available_node_types: 3", "available_node_types: {x: {node_config: {price_per_hour: dear}}}"]
)
def test_a_manifest_without_prices_is_one_line(tmp_path, capsys, text):
    manifest = tmp_path / "m.yaml"
    if text:
        manifest.write_text(text)
    assert main(["prometheus", str(LOCAL), "--run-dir", str(tmp_path / "run"), "--manifest", str(manifest)]) == 2
    assert str(manifest) in capsys.readouterr().err


def test_prices_and_budget_are_constant_series(tmp_path):
    prices = node_prices(ROOT / "cluster" / "manifests" / "local.yaml")
    assert set(prices) == {"head", "gpu-1", "gpu-8"} and prices["gpu-8"] > prices["gpu-1"]
    rules = cost_rules({"gpu-8": 6.0}, 12.5)[0]["rules"]
    assert rules == [
        {"record": "nodetype:tidepool_price_usd_per_hour", "expr": "vector(6.0)", "labels": {"NodeType": "gpu-8"}},
        {"record": "tidepool:budget_usd_per_hour", "expr": "vector(12.5)"},
    ]
    assert cost_rules({}, None) == [{"name": "costs", "rules": []}]


@pytest.mark.parametrize(
    ("sets", "scheme", "address"),
    [
        ((), "http", "127.0.0.1:8000"),
        (("node.host=0.0.0.0", "node.port=9000"), "http", "127.0.0.1:9000"),
        (("node.host=10.1.2.3", "node.tls={certificate: /c.pem, key: /k.pem}"), "https", "10.1.2.3:8000"),
    ],
)
def test_the_endpoint_is_asked_where_it_listens(sets, scheme, address):
    assert endpoint_target(load(LOCAL, list(sets))) == [{"targets": [address], "labels": {"__scheme__": scheme}}]


def test_each_alert_is_quiet_and_fires_in_promtool():
    promtool("test", "rules", CASES)
    fires: dict[str, list[bool]] = {}
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for look in case["alert_rule_test"]:
            fires.setdefault(look["alertname"], []).append(bool(look["exp_alerts"]))
    assert set(fires) == set(ALERTS)
    for name, looks in fires.items():
        assert looks[0] is False and True in looks, f"{name}: first quiet, then firing"


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_says_what_is_wrong_and_where_to_read_on(name):
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_the_runbook_has_an_entry_for_each_alert_and_no_other():
    page = (ROOT / "docs" / "runbook.md").read_text()
    entries = dict(re.findall(r"^### (\w+)\n(.+?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(entries) == list(ALERTS)
    for name, text in entries.items():
        assert len(text.split()) > 25, f"{name}: say what it means, where to look and what to do"


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in promql.DASHBOARDS}


def test_dashboards_are_whole():
    found = dashboards()
    assert set(found) == {"serving", "training", "cluster", "cost"}
    assert len({board["uid"] for board in found.values()}) == len({board["title"] for board in found.values()}) == len(found)
    for name, board in found.items():
        variables = {variable["name"]: variable for variable in board["templating"]["list"]}
        assert variables["source"]["type"] == "datasource" and variables["source"]["query"] == "prometheus"
        source = {"type": "prometheus", "uid": "${source}"}
        assert all(variable["datasource"] == source for variable in variables.values() if variable["type"] == "query")
        panels = board["panels"]
        assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels) > 4, name
        taken: set[tuple[int, int]] = set()
        for panel in panels:
            assert panel["datasource"] == source and panel["type"] == "timeseries"
            assert panel["targets"] and len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            used = set(re.findall(r"\$(\w+)", " ".join(target["expr"] for target in panel["targets"])))
            assert used <= set(variables), panel["title"]
            spot = panel["gridPos"]
            cells = {(spot["x"] + x, spot["y"] + y) for x in range(spot["w"]) for y in range(spot["h"])}
            assert not cells & taken and spot["x"] + spot["w"] <= 24, panel["title"]
            taken |= cells


def test_every_expression_is_promql(tmp_path):
    """As rules, which promtool reads."""
    asked = promql.expressions()
    rules = [{"record": f"checked:{number}", "expr": asked[number][1]} for number in range(len(asked))]
    file = tmp_path / "expressions.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


def test_the_day_s_spend_counts_at_the_pace_of_the_rules():
    pace = yaml.safe_load((promql.SHIPPED / "prometheus.yml").read_text())["global"]["evaluation_interval"]
    (day,) = [expression for title, expression in promql.expressions() if title == "cost: Spent in the last day"]
    assert day.startswith(f"{pace.removesuffix('s')} / 3600 * sum(sum_over_time(")


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (model) (rate(a_total{status=~"5..", b="c{d}"}[5m])) / (e:f:rate5m > 0)', {"a_total", "e:f:rate5m"}),
        ("max(g) - 1e6 * on (h) group_left (i) j offset 5m and on (k) l > 0.5", {"g", "j", "l"}),
        ('up{job="x"} == 0 unless absent(m)', {"up", "m"}),
    ],
)
def test_the_names_in_an_expression(expression, names):
    assert promql.metrics(expression) == names


def test_recorded_names_that_are_asked_for_are_recorded():
    recorded = {rule["record"] for rule in promql.rules("rules.yml")}
    recorded |= {rule["record"] for rule in cost_rules({"x": 1.0}, 1.0)[0]["rules"]}
    asked = {name for name in promql.named() if ":" in name}
    assert asked <= recorded
    assert recorded <= asked, f"recorded for nobody: {recorded - asked}"


def test_metrics_of_ours_are_documented():
    page = (ROOT / "docs" / "operations.md").read_text()
    for name in {name for name in promql.named() if name.startswith("ray_tidepool_")}:
        assert f"`{name.removeprefix('ray_').removesuffix('_bucket')}`" in page, name
