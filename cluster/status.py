"""`python -m cluster status`: asks everybody at once, and prints one screen, once or again and again.

No driver joins the cluster: Ray's dashboard and Serve answer over HTTP on 127.0.0.1 with the token, gateways and metrics agents
where HAProxy and Ray say that they are. Whoever does not answer leaves a "?" on the screen. What answers mean is in `observe`,
what the screen looks like in `screen`. It runs on the machine of the head; `ray_up.on_head` runs it there for a manifest.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from cluster import deploy, observe, processes, screen
from cluster.config import Config
from cluster.errors import ConfigError, LaunchError
from cluster.session import Session, read_json, session_of
from cluster.steps import root_url, trust

PERIOD_S = 2.0
ANSWER_S, READY_S = 3.0, 10.0
MOST = 10_000  # rows that Ray's state API gives at once
REPLICA = re.compile(r"^\s*server SERVE_REPLICA_gateway-\S+ (\S+:\d+)", re.MULTILINE)
CLEAR = "\x1b[H\x1b[J"
Say = Callable[[str], None]


def status(config: Config, out: Say, watch: bool = False, as_json: bool = False) -> int:
    """Print what runs. Returns 0 when the endpoint serves, else 1; with `watch` 0, once Ctrl-C ends it.

    Args:
        watch: Draw it again every `PERIOD_S`.
        as_json: The observation as one line of JSON instead of the screen.
    """
    session = session_of(config)
    if not watch:
        return _show(look(config, session), out, as_json)
    try:
        while True:
            seen = look(config, session)
            if sys.stdout.isatty() and not as_json:
                out(CLEAR + "\n".join(_lines(seen)))
            else:
                _show(seen, out, as_json)
            time.sleep(PERIOD_S)
    except KeyboardInterrupt:
        return 0


def look(config: Config, session: Session) -> observe.Observation:
    """Ask everybody, now. Takes as long as the slowest of them, and raises nothing when one is away."""
    now, count = time.time(), len(processes.marked(session.run_dir))
    if not count:
        return observe.Observation(now, str(session.run_dir), 0)
    dashboard = f"http://127.0.0.1:{config.node.dashboard_port}"
    token, metrics_token = _read(session.token), _read(session.metrics_token)

    def ask(path: str) -> deploy.Answer:
        return deploy.call(f"{dashboard}{path}", token=token, timeout_s=ANSWER_S)

    def rows(name: str, state: str = "") -> list[dict[str, Any]] | None:
        return observe.listed(ask(f"/api/v0/{name}?detail=1&limit={MOST}{state}"))

    def scrape(addresses: Iterable[str]) -> list[observe.Sample] | None:
        urls = [f"http://{address}/metrics" for address in addresses]
        with ThreadPoolExecutor(16) as more:
            answers = list(more.map(lambda url: deploy.call(url, token=metrics_token, timeout_s=ANSWER_S), urls))
        texts = [answer.body for answer in answers if answer.status == 200]
        return [sample for text in texts for sample in observe.samples(text)] if texts else None

    with ThreadPoolExecutor(16) as threads:
        ready = threads.submit(_readiness, config, session)
        nodes = threads.submit(rows, "nodes")
        actors = threads.submit(rows, "actors", "&filter_keys=state&filter_predicates=!%3D&filter_values=DEAD")
        groups = threads.submit(rows, "placement_groups", "&filter_keys=state&filter_predicates=%3D&filter_values=CREATED")
        tasks = threads.submit(rows, "tasks", "&filter_keys=state&filter_predicates=%3D&filter_values=RUNNING")
        served = threads.submit(lambda: observe.applications(ask("/api/serve/applications/")))
        jobs = threads.submit(ask, "/api/jobs/")
        agents = threads.submit(lambda: scrape(observe.targets(ask("/api/prometheus/sd")) or ()))
        gateways = threads.submit(lambda: scrape(gateway_addresses(session)))
    apps = served.result()
    alive, gone = (None, 0) if (found := nodes.result()) is None else observe.nodes(found, _prices(), now)
    holders = (actors.result(), groups.result())
    known = alive is not None and None not in holders
    usd, unpriced = observe.cost(alive or ())
    endpoint = read_json(session.endpoint) or {}
    return observe.Observation(
        at=now,
        run_dir=str(session.run_dir),
        processes=count,
        ready=ready.result()[0],
        readiness=ready.result()[1],
        endpoint=endpoint.get("base_url"),
        keys=str(session.endpoint),
        nodes=None if alive is None else tuple(alive),
        gone=gone,
        starting=observe.starting(agents.result()),
        gpus=observe.gpus(alive or (), holders[0] or (), holders[1] or (), tasks.result() or ()) if known else None,
        gateway=(apps or {}).get(observe.GATEWAY, observe.Application(observe.GATEWAY)),
        models=observe.models(config.models, apps, gateways.result(), agents.result()),
        jobs=observe.jobs(jobs.result(), actors.result(), agents.result(), now),
        usd_per_hour=usd,
        unpriced=unpriced,
    )


def gateway_addresses(session: Session) -> list[str]:
    """`host:port` of every gateway replica, as HAProxy was told; asked directly, each tells its own requests."""
    # Serve keeps it in a folder named after the node.
    texts = [_read(path) or "" for path in (session.run_dir / "h").glob("*/haproxy.cfg")]
    return sorted({address for text in texts for address in REPLICA.findall(text)})


def _readiness(config: Config, session: Session) -> tuple[bool, str]:
    """Whether the endpoint serves, and what it says of itself."""
    try:
        answer = deploy.call(f"{root_url(config)}/readyz", timeout_s=READY_S, trust=trust(config, session))
    except LaunchError as error:  # a certificate that cannot be used
        return False, str(error)
    text = " ".join(answer.body.decode(errors="replace").split())[:400] if answer.status else "no answer"
    return answer.status == 200, text


def _prices() -> dict[str, float]:
    """US dollars per hour by node type, from the manifest that `ray up` left on the head."""
    from cluster.prometheus import BOOTSTRAP, node_prices

    manifest = BOOTSTRAP.expanduser()
    try:
        return node_prices(manifest) if manifest.exists() else {}
    except ConfigError:
        return {}


def _show(seen: observe.Observation, out: Say, as_json: bool) -> int:
    out(json.dumps(asdict(seen)) if as_json else "\n".join(_lines(seen)))
    return 0 if seen.ready else 1


def _lines(seen: observe.Observation) -> list[str]:
    return screen.lines(seen, shutil.get_terminal_size((120, 40)).columns)


def _read(path: Any) -> str | None:
    """A small file's text, or None when it is not there or not ours to read."""
    try:
        return str(path.read_text()).strip()
    except OSError:
        return None
