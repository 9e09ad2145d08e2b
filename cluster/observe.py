"""What a cluster is doing, as frozen dataclasses, out of the answers of Ray's dashboard, Serve, gateways and metrics agents.

Pure: bytes that somebody fetched go in (`status` does), what they say comes out. None means that the source did not answer or
does not say it; a broken answer is an answer that was not there. Which GPU does what follows from who holds it: a Serve replica,
a worker of Ray Train, anybody else, nobody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import deploy
from cluster.config import ModelConfig

GATEWAY = "gateway"  # the application's name
NODE_TYPE = "ray.io/node-group"  # Ray's label for the name that a manifest gives a kind of node
TRAIN_NAMESPACE, TRAIN_PREFIX = "tidepool-train", "tidepool-train-"  # of the actors that own a run, see train.run
ENDED_SHOWN, ENDED_S = 5, 3600.0
SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
OURS = ("ray_tidepool_", "tidepool_", "autoscaler_pending_nodes")


@dataclass(frozen=True)
class Node:
    """One machine that is part of the cluster now. `kind` is its type in the manifest, `usd_per_hour` what that costs."""

    name: str
    kind: str | None
    head: bool
    cpus: float
    gpus: float
    uptime_s: float | None
    usd_per_hour: float | None


@dataclass(frozen=True)
class Gpus:
    """Logical GPUs by who holds them."""

    total: float
    serving: float
    training: float
    other: float

    @property
    def idle(self) -> float:
        """What nobody holds."""
        return max(0.0, self.total - self.serving - self.training - self.other)


@dataclass(frozen=True)
class Application:
    """One Serve application: its state, replicas that run, how many there should be, and why if something is wrong."""

    name: str
    state: str | None = None
    replicas: int | None = None
    wanted: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Model:
    """One model of the configuration: its application, requests at engines and in queues, KV cache use, and the tokens/s of one
    that `generates`."""

    application: Application
    running: int | None = None
    queued: int | None = None
    tokens_per_s: float | None = None
    kv_use: float | None = None
    generates: bool = True


@dataclass(frozen=True)
class Job:
    """A training run or a Ray job; `step` and `tokens_per_s` are a run's."""

    name: str
    kind: str
    state: str
    age_s: float | None = None
    step: int | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class Observation:
    """One look at everything. `starting` are nodes on their way by type; `at` is wall-clock time, s."""

    at: float
    run_dir: str
    processes: int
    ready: bool = False
    readiness: str = ""
    endpoint: str | None = None
    keys: str | None = None
    nodes: tuple[Node, ...] | None = None
    gone: int = 0
    starting: tuple[tuple[str, int], ...] = ()
    gpus: Gpus | None = None
    gateway: Application = Application(GATEWAY)
    models: tuple[Model, ...] = ()
    jobs: tuple[Job, ...] | None = None
    usd_per_hour: float | None = None
    unpriced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One line of a Prometheus exposition."""

    name: str
    labels: Mapping[str, str]
    value: float


def listed(answer: deploy.Answer) -> list[dict[str, Any]] | None:
    """The rows of an answer of Ray's state API."""
    try:
        rows = answer.json()["data"]["result"]["result"]
    except (KeyError, TypeError):
        return None
    return [row for row in rows if isinstance(row, dict)] if answer.status == 200 and isinstance(rows, list) else None


def samples(text: bytes) -> list[Sample]:
    """Our own samples of an exposition, and the autoscaler's nodes on their way; Ray's own thousands are passed over."""
    found = []
    for line in text.decode(errors="replace").splitlines():
        match = SAMPLE.fullmatch(line) if line.startswith(OURS) else None
        if match:
            found.append(Sample(match[1], dict(LABEL.findall(match[2] or "")), float(match[3])))
    return found


def targets(answer: deploy.Answer) -> list[str] | None:
    """`host:port` of every metrics agent, from Ray's service discovery."""
    try:
        groups = json.loads(answer.body)
        return [str(target) for group in groups for target in group["targets"]] if answer.status == 200 else None
    except (ValueError, KeyError, TypeError):
        return None


def nodes(rows: Iterable[dict[str, Any]], prices: Mapping[str, float], now: float) -> tuple[list[Node], int]:
    """The nodes that are alive, the head first, and how many were."""
    alive, gone = [], 0
    for row in rows:
        if row.get("state") != "ALIVE":
            gone += 1
            continue
        resources, labels = row.get("resources_total") or {}, row.get("labels") or {}
        kind, started = labels.get(NODE_TYPE), row.get("start_time_ms")
        alive.append(
            Node(
                name=str(row.get("node_name") or row.get("node_ip")),
                kind=kind,
                head=bool(row.get("is_head_node")),
                cpus=float(resources.get("CPU", 0)),
                gpus=float(resources.get("GPU", 0)),
                uptime_s=now - started / 1000 if started else None,
                usd_per_hour=prices.get(kind) if kind else None,
            )
        )
    return sorted(alive, key=lambda node: (not node.head, node.kind or "", node.name)), gone


def cost(alive: Iterable[Node]) -> tuple[float | None, tuple[str, ...]]:
    """US dollars per hour of the nodes whose price is known, None when it is of none, and the types of the others."""
    known = [node.usd_per_hour for node in alive if node.usd_per_hour is not None]
    unknown = {node.kind or "a node without a type" for node in alive if node.usd_per_hour is None}
    return (sum(known), tuple(sorted(unknown))) if known else (None, ())


def gpus(
    alive: Iterable[Node],
    actors: Sequence[dict[str, Any]],
    groups: Iterable[dict[str, Any]],
    tasks: Iterable[dict[str, Any]],
) -> Gpus:
    """Who holds the GPUs. A placement group counts whole, as what the actors in it are."""
    held = {"serving": 0.0, "training": 0.0, "other": 0.0}
    uses: dict[str, str] = {}
    for actor in (actor for actor in actors if actor.get("state") != "DEAD"):
        use = _use(str(actor.get("class_name", "")))
        group = actor.get("placement_group_id")
        if group:
            uses[group] = use if uses.get(group, "other") == "other" else uses[group]
        elif actor.get("state") == "ALIVE":
            held[use] += float((actor.get("required_resources") or {}).get("GPU", 0))
    for group in groups:
        if group.get("state") == "CREATED":
            use = "serving" if str(group.get("name", "")).startswith("SERVE_") else uses.get(group["placement_group_id"], "other")
            held[use] += sum(float(bundle["unit_resources"].get("GPU", 0)) for bundle in group.get("bundles") or ())
    for task in tasks:
        if task.get("type") == "NORMAL_TASK" and not task.get("placement_group_id"):
            held["other"] += float((task.get("required_resources") or {}).get("GPU", 0))
    return Gpus(sum(node.gpus for node in alive), **held)


def applications(answer: deploy.Answer) -> dict[str, Application] | None:
    """Serve's applications by name."""
    apps = answer.json().get("applications")
    if answer.status != 200 or not isinstance(apps, dict):
        return None
    found = {}
    for name, app in apps.items():
        deployments = list(app.get("deployments", {}).values())
        state = str(app.get("status", "unknown")).lower().replace("_", " ")
        # An application's engine is its one deployment with autoscaling or, with a router of its own beside it, the first.
        main = deployments[0] if deployments else {}
        wanted = main.get("target_num_replicas")
        running = sum(str(replica.get("state")) == "RUNNING" for replica in main.get("replicas", ()))
        if state == "running" and wanted == 0 and not running:
            state = "asleep"
        why = deploy.cause(app) if state in ("deploy failed", "unhealthy") else ""
        found[str(name)] = Application(str(name), state, running, None if wanted is None else int(wanted), why)
    return found


def models(
    configured: Iterable[ModelConfig],
    apps: Mapping[str, Application] | None,
    gateways: Sequence[Sample] | None,
    agents: Sequence[Sample] | None,
) -> tuple[Model, ...]:
    """The models of the configuration, what gateways say of their requests, and what engines say, some seconds late."""
    found = []
    for model in configured:
        missing = Application(model.app_name) if apps is None else Application(model.app_name, "missing", 0, 0)
        app = missing if apps is None else apps.get(model.app_name, missing)
        app = Application(model.id, app.state, app.replicas, app.wanted, app.why)
        running = _sum(gateways, "tidepool_running_requests", model.id)
        queued = _sum(gateways, "tidepool_queued_requests", model.id)
        speed = _sum(agents, "ray_tidepool_engine_tokens_per_second", model.id) if model.task == "generate" else None
        kv = _values(agents, "ray_tidepool_engine_kv_use", model.id)
        if app.replicas == 0:  # its last figures linger at the agents
            speed, kv = 0.0, []
        found.append(
            Model(
                app,
                None if running is None else int(running),
                None if queued is None else int(queued),
                speed,
                sum(kv) / len(kv) if kv else None,
                model.task == "generate",
            )
        )
    return tuple(found)


def jobs(
    answer: deploy.Answer, actors: Iterable[dict[str, Any]] | None, agents: Iterable[Sample] | None, now: float
) -> tuple[Job, ...] | None:
    """Training runs, then Ray's jobs: those that go on, and the last few that ended lately."""
    try:
        rows = json.loads(answer.body) if answer.status == 200 else None
    except ValueError:
        rows = None
    if not isinstance(rows, list) and actors is None:
        return None
    figures: dict[str, dict[str, float]] = {}
    for sample in agents or ():
        if sample.name.startswith("ray_tidepool_train_"):
            figures.setdefault(sample.labels.get("run", "?"), {})[sample.name.removeprefix("ray_tidepool_train_")] = sample.value
    states = dict.fromkeys(figures, "running")
    for actor in actors or ():
        name = str(actor.get("name") or "")
        if actor.get("ray_namespace") == TRAIN_NAMESPACE and name.startswith(TRAIN_PREFIX) and actor.get("state") != "DEAD":
            state = str(actor.get("state")).lower().replace("_", " ")
            states[name.removeprefix(TRAIN_PREFIX)] = "running" if state == "alive" else state
    runs = []
    for name, state in sorted(states.items()):
        shown = figures.get(name, {})
        step = shown.get("step")
        runs.append(Job(name, "training", state, None, None if step is None else int(step), shown.get("tokens_per_s")))
    return (*runs, *_ray_jobs([row for row in rows or () if isinstance(row, dict)], now))


def _ray_jobs(rows: list[dict[str, Any]], now: float) -> list[Job]:
    going, ended = [], []
    for row in rows:
        state, started = str(row.get("status", "?")).lower(), row.get("start_time")
        age = now - started / 1000 if started else None
        if row.get("type") == "SUBMISSION":
            job = Job(str((row.get("metadata") or {}).get("job_name") or row.get("submission_id")), "job", state, age)
        else:
            words = str(row.get("entrypoint") or "").split() or ["driver"]
            job = Job(
                " ".join(words[1:4] if words[0].rpartition("/")[2].startswith("python") else words[:3]), "driver", state, age
            )
        if state in ("pending", "running"):
            going.append(job)
        elif job.kind == "job" and now - (row.get("end_time") or 0) / 1000 < ENDED_S:
            ended.append((row.get("end_time") or 0, job))
    ended.sort(key=lambda pair: -pair[0])
    return going + [job for _, job in ended[:ENDED_SHOWN]]


def starting(agents: Iterable[Sample] | None) -> tuple[tuple[str, int], ...]:
    """Nodes that the autoscaler has asked for and that have not joined, by type."""
    found = [(sample.labels.get("NodeType", "?"), int(sample.value)) for sample in agents or () if sample.name == OURS[2]]
    return tuple(sorted((kind, count) for kind, count in found if count))


def _use(class_name: str) -> str:
    if class_name.startswith("ServeReplica"):
        return "serving"
    return "training" if class_name == "RayTrainWorker" else "other"


def _values(found: Sequence[Sample] | None, name: str, model: str) -> list[float]:
    return [sample.value for sample in found or () if sample.name == name and sample.labels.get("model") == model]


def _sum(found: Sequence[Sample] | None, name: str, model: str) -> float | None:
    values = _values(found, name, model)
    return sum(values) if values else None
