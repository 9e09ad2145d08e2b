"""The one configuration model: what a YAML file of ours may say, and what it means.

`load(path, overrides)` reads a file, applies `--set a.b=c` overrides and validates; every mistake is named with its path
in the file. This module imports neither torch, ray nor vllm, so that a check of a file takes milliseconds. It decides
nothing about a machine (that is `launch`) and builds nothing (that is `serve_apps.app`).

Units: seconds, bytes and US dollars unless a name says otherwise. `engine_kwargs` is the one pass-through door: vLLM's own
argument names (`tensor_parallel_size`, `quantization`, `enable_lora`, ...), checked by vLLM itself.
"""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cluster import secrecy
from cluster.errors import ConfigError
from cluster.sections import Section
from cluster.train_config import TrainConfig, TuneConfig

EMBEDDED_PREFIX = "embedded:"
MODEL_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")


class TlsConfig(Section):
    """The endpoint's certificate, as two files on every node that runs HAProxy; see `tls`."""

    certificate: str = Field(description="PEM file: the certificate, then the chain up to its authority.")
    key: str = Field(description="PEM file of its private key, for its owner only.")


class NodeConfig(Section):
    """The machine `make up` starts Ray on, and the addresses it listens on."""

    host: str = Field("127.0.0.1", description="Address the endpoint binds. 0.0.0.0 opens it to the network.")
    port: int = Field(8000, ge=1, le=65535, description="Port of the OpenAI-compatible endpoint.")
    gcs_port: int = Field(6379, ge=1, le=65535, description="Ray's GCS.")
    dashboard_port: int = Field(8265, ge=1, le=65535, description="Ray's dashboard and job server, on 127.0.0.1 only.")
    stats_port: int = Field(8404, ge=1, le=65535, description="HAProxy's statistics page, on 127.0.0.1 only.")
    proxy_metrics_port: int = Field(9101, ge=1, le=65535, description="HAProxy's Prometheus metrics, on 127.0.0.1 only.")
    replica_ports: tuple[int, int] = Field((30000, 30100), description="First and last port that Serve replicas may take.")
    num_cpus: float | None = Field(None, gt=0, description="Logical CPUs told to Ray; default 16, they are only bookkeeping.")
    num_gpus: float | None = Field(None, ge=0, description="GPUs told to Ray; default: what Ray detects.")
    object_store_mb: int = Field(200, ge=80, description="Ray's shared-memory object store, MiB.")
    min_free_memory_mb: int = Field(4096, ge=0, description="`up` refuses to start with less available memory, MiB.")
    proxies: Literal["every_node", "head_only"] = Field("every_node", description="Where HAProxy runs.")
    tls: TlsConfig | None = Field(None, description="The endpoint speaks HTTPS with this certificate, and HTTP no more.")


class StoreConfig(Section):
    """Where keys, usage and jobs are kept."""

    url: str | None = Field(None, description="SQLAlchemy URL; default SQLite in the run directory of the head.")

    @field_validator("url")
    @classmethod
    def _without_password(cls, value: str | None) -> str | None:
        if value is not None and secrecy.in_url(value):
            raise ValueError(f"it holds a password; leave that out, {secrecy.HOW_DATABASE}")
        return value


class AdmissionConfig(Section):
    """What happens to a request when its model is busy or asleep."""

    max_queued: int = Field(512, ge=0, description="Requests that may wait per model and gateway replica.")
    max_wait_s: float = Field(60.0, gt=0, description="Longest wait in that queue before a 503.")
    hold_s: float = Field(180.0, ge=0, description="Longest wait for a model that has no replica yet.")
    keepalive_s: float = Field(5.0, gt=0, description="A held stream gets an SSE comment this often.")


class GatewayConfig(Section):
    """The front door: one ASGI application, any number of replicas."""

    replicas: int = Field(1, ge=1)
    max_body_mb: float = Field(16.0, gt=0, description="Larger request bodies get a 413.")
    retries: int = Field(2, ge=0, description="Other engine replicas tried when one dies before its first byte.")
    connect_timeout_s: float = Field(5.0, gt=0)
    body_timeout_s: float = Field(30.0, gt=0, description="A client has this long to send its body before a 408.")
    sync_s: float = Field(1.0, gt=0, le=1.0, description="How often keys and usage are exchanged with the store.")
    admission: AdmissionConfig = AdmissionConfig()


class TracingConfig(Section):
    """OpenTelemetry traces of requests, gateway and engine; none without `endpoint`."""

    endpoint: str | None = Field(None, description="OTLP over HTTP, such as http://collector:4318/v1/traces.")
    sample: float = Field(1.0, ge=0, le=1, description="Part of the requests; a client's traceparent decides for its own.")
    max_queued: int = Field(2048, ge=1, description="Spans that may wait per gateway replica; more are dropped.")

    @field_validator("endpoint")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urllib.parse.urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname or not parts.path.strip("/"):
                raise ValueError("write the whole URL, such as http://collector:4318/v1/traces")
            if parts.username or parts.query:
                raise ValueError("keep secrets out of it; set OTEL_EXPORTER_OTLP_TRACES_HEADERS in the environment of `up`")
        return value


class Price(Section):
    """US dollars per million tokens."""

    prompt: float = Field(0.0, ge=0)
    cached: float | None = Field(None, ge=0, description="Prompt tokens read from the prefix cache; default: as `prompt`.")
    completion: float = Field(0.0, ge=0)


class AutoscalingConfig(Section):
    """Replicas of one model. `min_replicas: 0` lets it sleep; a request wakes it."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Running requests per replica to aim at; default 0.75 of `max_ongoing_requests`."
    )
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)
    downscale_to_zero_delay_s: float = Field(600.0, ge=0)
    max_kv_use: float = Field(0.9, gt=0, le=1, description="A fuller KV cache is too much work, whatever the requests.")
    target_ttft_s: float | None = Field(None, gt=0, description="A longer time to first token in the engines is, too.")

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is larger than max_replicas ({self.max_replicas})")
        return self


class ModelConfig(Section):
    """One model, one Serve application under `/engines/<id>`."""

    id: str = Field(description="The name clients put in `model`.")
    model_source: str | None = Field(
        None,
        description="Hugging Face repository, local folder, s3:// or gs:// address, or `embedded:chat` / `embedded:embed`, "
        "which are built on the machine. Default: the id.",
    )
    task: Literal["generate", "embed", "score", "transcribe"] = "generate"
    aliases: tuple[str, ...] = ()
    adapters: dict[str, str] = Field(
        default_factory=dict, description="LoRA adapters by name, each a folder; served as `<id>:<name>`."
    )
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed to vLLM as they are.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment of the engine's processes.")
    device: Literal["cpu", "gpu"] = "gpu"
    accelerator_type: str | None = Field(None, description="Ray's name of the GPU, such as L4 or H200.")
    cpus_per_replica: float = Field(1.0, ge=0)
    max_ongoing_requests: int | None = Field(
        None, ge=1, description="Requests in flight per replica; default: vLLM's max_num_seqs, or 128."
    )
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    routing: Literal["least_busy", "prefix_affinity"] = "least_busy"
    surge: bool = Field(True, description="A rollout starts new replicas before it stops old ones; needs free GPUs for both.")
    max_generation_s: float = Field(600.0, gt=0, description="Longest generation; a replica that stops waits this long for it.")
    stall_timeout_s: float = Field(120.0, gt=0, description="Requests running, no token for this long: the replica is replaced.")
    price: Price = Price()

    @field_validator("id", "aliases")
    @classmethod
    def _named(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if not MODEL_ID.fullmatch(name):
                raise ValueError(f"{name!r}: use letters, digits, '.', '_', '-' and at most one '/'")
        return value

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if secrecy.names_secret(name):
                raise ValueError(f"{name}: a secret does not belong here; {secrecy.HOW}")
        return value

    @field_validator("engine_kwargs")
    @classmethod
    def _reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = {"model": "model_source", "served_model_name": "id", "lora_modules": "adapters", "api_key": "the gateway's keys"}
        for name, instead in ours.items():
            if name in value:
                raise ValueError(f"{name!r} is set by {instead}; remove it from engine_kwargs")
        if isinstance(value.get("hf_token"), str):
            raise ValueError(f"'hf_token' is a secret and does not belong here; {secrecy.HOW}")
        return value

    @property
    def source(self) -> str:
        """What vLLM loads, before an `embedded:` name is resolved to a folder."""
        return self.model_source or self.id

    @property
    def slots(self) -> int:
        """Requests in flight per replica."""
        return self.max_ongoing_requests or int(self.engine_kwargs.get("max_num_seqs", 128))

    @property
    def target_ongoing_requests(self) -> float:
        """Running requests per replica that autoscaling aims at."""
        return self.autoscaling.target_ongoing_requests or max(1.0, 0.75 * self.slots)

    @property
    def app_name(self) -> str:
        """Serve's name of the application."""
        return "engine-" + self.id.replace("/", "--").replace(".", "_")

    @property
    def path(self) -> str:
        """Route prefix of the application."""
        return f"/engines/{self.id}"

    @property
    def names(self) -> tuple[str, ...]:
        """Every name a client may use: the id, its aliases, its adapters."""
        return (self.id, *self.aliases, *(f"{self.id}:{name}" for name in self.adapters))


class Config(Section):
    """A whole file."""

    run_dir: str = Field("run", description="Everything `up` writes goes below this folder.")
    node: NodeConfig = NodeConfig()
    store: StoreConfig = StoreConfig()
    gateway: GatewayConfig = GatewayConfig()
    tracing: TracingConfig = TracingConfig()
    models: tuple[ModelConfig, ...] = ()
    train: TrainConfig | None = Field(None, description="A training run: `python -m train sft`.")
    tune: TuneConfig | None = Field(None, description="A search over it: `python -m train tune`.")

    @model_validator(mode="after")
    def _something(self) -> Config:
        if not self.models and self.train is None:
            raise ValueError("write at least one of 'models' (to serve) and 'train' (to train)")
        if self.tune is not None and self.train is None:
            raise ValueError("'tune' searches over 'train', which is missing")
        return self

    @model_validator(mode="after")
    def _traceable(self) -> Config:
        for number, model in enumerate(self.models):
            if self.tracing.endpoint and model.engine_kwargs.get("disable_log_stats"):
                raise ValueError(f"models.{number}.engine_kwargs.disable_log_stats: vLLM's traces need its figures; remove it")
        return self

    @model_validator(mode="after")
    def _distinct(self) -> Config:
        seen: dict[str, str] = {}
        for model in self.models:
            for name in model.names:
                if name in seen:
                    raise ValueError(f"models: the name {name!r} is used by {seen[name]!r} and by {model.id!r}")
                seen[name] = model.id
        apps: dict[str, str] = {}
        for model in self.models:
            if model.app_name in apps:
                raise ValueError(f"models: {apps[model.app_name]!r} and {model.id!r} give the same application name")
            apps[model.app_name] = model.id
        return self


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read and validate a YAML file.

    Args:
        path: The file.
        overrides: `a.b=c` each; a number in the path indexes a list (`models.0.id=x`), the value is read as YAML.

    Raises:
        ConfigError: the file is missing, is not YAML, or says something that is not allowed; one line per mistake, each
            with its path in the file.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping with the key 'models' or 'train', found {type(data).__name__}")
    for override in overrides or []:
        _apply(data, override)
    return parse(data, str(path))


def to_serve(config: Config, where: str) -> Config:
    """The same configuration, which serves something.

    Raises:
        ConfigError: it only trains.
    """
    if not config.models:
        raise ConfigError(f"{where}: has no 'models' to serve; it is for `python -m train`")
    return config


def parse(data: dict[str, Any], where: str = "config") -> Config:
    """Validate a mapping that is already in memory; see `load`."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = []
        items = error.errors(include_url=False)
        inside = any(item["loc"][:1] == ("models",) and len(item["loc"]) > 1 for item in items)
        for item in items:
            # pydantic counts only the models without a mistake, and then finds too few of them.
            if inside and item["loc"] == ("models",) and item["type"] == "too_short":
                continue
            spot = ".".join(str(part) for part in item["loc"]) or "(top level)"
            text = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {spot}: {text}")
        raise ConfigError("\n".join(lines)) from error


def _apply(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` to the raw mapping, in place."""
    path, found, text = override.partition("=")
    if not found or not path:
        raise ConfigError(f"--set {override}: write it as a.b=value")
    *parents, last = path.split(".")
    spot: Any = data
    for part in parents:
        spot = _step(spot, part, override)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error
    if isinstance(spot, list):
        _step(spot, last, override)
        spot[int(last)] = value
    elif isinstance(spot, dict):
        spot[last] = value
    else:
        raise ConfigError(f"--set {override}: {'.'.join(parents)} is a value, not a section")


def _step(spot: Any, part: str, override: str) -> Any:
    """One step down; a missing section of a mapping is made."""
    if isinstance(spot, list):
        if not part.isdigit() or int(part) >= len(spot):
            raise ConfigError(f"--set {override}: {part!r} is not one of the {len(spot)} entries")
        return spot[int(part)]
    if not isinstance(spot, dict):
        raise ConfigError(f"--set {override}: {part!r} is below a value, not a section")
    return spot.setdefault(part, {})
