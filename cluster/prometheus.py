"""Writes what Prometheus and Grafana need to watch a cluster into its run directory, and says how to start them.

The files of `cluster/monitoring` are copied as they are: their paths are relative and lead to what Ray and `up` keep in the run
directory (the list of metrics agents, the metrics token). Made here are only the endpoint's address, what nodes cost, and
Grafana's list of folders. Neither program is started or kept running here. Called by `python -m cluster prometheus`, on the
head's machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.prices import hourly_price
from cluster.session import Session
from cluster.steps import root_url

SHIPPED = Path(__file__).with_name("monitoring")
ADDRESS = "127.0.0.1:9090"
# Where the autoscaler keeps the manifest on the head.
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")


def prometheus(config: Config, session: Session, manifest: Path | None, budget: float | None, out: Callable[[str], None]) -> int:
    """Write both folders and print the commands that start the programs. Returns 0.

    Args:
        manifest: Where node types have their prices; without it the one that the cluster was launched with, if any.
        budget: US dollars per hour above which `SpendHigh` fires.

    Raises:
        ConfigError: the manifest cannot be read, or a price is not a number.
    """
    bootstrap = BOOTSTRAP.expanduser()
    prices = node_prices(manifest or bootstrap) if manifest or bootstrap.exists() else {}
    watch, grafana = write(config, session, prices, budget)
    options = ("config.file", watch / "prometheus.yml"), ("storage.tsdb.path", watch / "data"), ("web.listen-address", ADDRESS)
    out(" ".join(["prometheus", *(f"--{name}={value}" for name, value in options)]))
    out(f"GF_PATHS_PROVISIONING={grafana / 'provisioning'} grafana-server --homepath=/usr/share/grafana")
    return 0


def write(config: Config, session: Session, prices: Mapping[str, float], budget: float | None) -> tuple[Path, Path]:
    """The folders of Prometheus and of Grafana, below the run directory; what they held of us is replaced, all else stays."""
    watch, grafana = session.run_dir / "prometheus", session.run_dir / "grafana"
    session.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    watch.mkdir(exist_ok=True)
    for name in ("prometheus.yml", "rules.yml", "alerts.yml"):
        shutil.copyfile(SHIPPED / name, watch / name)
    (watch / "endpoint.json").write_text(json.dumps(endpoint_target(config)))
    (watch / "costs.yml").write_text(yaml.safe_dump({"groups": cost_rules(prices, budget)}, sort_keys=False))
    dashboards = grafana / "dashboards"
    shutil.copytree(SHIPPED / "grafana", dashboards, dirs_exist_ok=True)
    providers = [{"name": "tidepool", "folder": "Tidepool", "type": "file", "options": {"path": str(dashboards)}}]
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": f"http://{ADDRESS}", "isDefault": True}
    for kind, content in (("dashboards", {"providers": providers}), ("datasources", {"datasources": [source]})):
        folder = grafana / "provisioning" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tidepool.yaml").write_text(yaml.safe_dump({"apiVersion": 1, **content}, sort_keys=False))
    return watch, grafana


def endpoint_target(config: Config) -> list[dict[str, Any]]:
    """The endpoint as Prometheus' file discovery takes it, reached from the head itself."""
    scheme, _, address = root_url(config).partition("://")
    return [{"targets": [address], "labels": {"__scheme__": scheme}}]


def node_prices(manifest: Path) -> dict[str, float]:
    """US dollars per hour by node type, of those whose price is known.

    Raises:
        ConfigError: see `prometheus`.
    """
    try:
        data = yaml.safe_load(manifest.read_text())
        priced = {str(name): hourly_price(node_type) for name, node_type in data["available_node_types"].items()}
    except OSError as error:
        raise ConfigError(f"{manifest}: {error.strerror}") from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{manifest}: has no available_node_types whose prices are numbers; give a manifest of `ray up`"
        ) from error
    return {name: price for name, price in priced.items() if price is not None}


def cost_rules(prices: Mapping[str, float], budget: float | None) -> list[dict[str, Any]]:
    """Prices and budget as constant series, which `rules.yml` and `alerts.yml` read."""
    rules: list[dict[str, Any]] = [
        {"record": "nodetype:tidepool_price_usd_per_hour", "expr": f"vector({price})", "labels": {"NodeType": name}}
        for name, price in prices.items()
    ]
    if budget is not None:
        rules.append({"record": "tidepool:budget_usd_per_hour", "expr": f"vector({budget})"})
    return [{"name": "costs", "rules": rules}]
