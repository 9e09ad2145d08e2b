"""What `run/endpoint.json` says, and the command line of the same engine without us. Called by the arms.

`make up` writes the file: the address and keys of the running endpoint and, per model, the arguments its engine got. With
it any client finds the endpoint, and the bench starts a bare vLLM server that differs in nothing but what stands before it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError


@dataclass(frozen=True)
class Model:
    """One served model: vLLM's own argument names in `engine_kwargs`, `model` being the folder it loads."""

    id: str
    path: str
    task: str
    engine_kwargs: dict[str, Any]
    env: dict[str, str]


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint; `base_url` ends with `/v1`, `run_id` marks its processes, `certificate` is the file to know it by."""

    base_url: str
    api_key: str
    models: tuple[Model, ...]
    run_id: str | None = None
    certificate: str | None = None

    @property
    def root(self) -> str:
        """The address without `/v1`."""
        return self.base_url.removesuffix("/v1")

    def model(self, name: str | None = None) -> Model:
        """The model of that id, or the first that generates."""
        for model in self.models:
            if model.id == name or (name is None and model.task == "generate"):
                return model
        raise ConfigError(f"no model {name!r} in the endpoint file" if name else "no model that generates in the endpoint file")


def read(path: Path) -> Endpoint:
    """Read the file.

    Raises:
        ConfigError: it is missing or lacks a field.
    """
    try:
        data = json.loads(path.read_text())
        models = tuple(
            Model(
                id=item["id"],
                path=item["path"],
                task=item.get("task", "generate"),
                engine_kwargs=dict(item["engine_kwargs"]),
                env={name: str(value) for name, value in (item.get("env") or {}).items()},
            )
            for item in data["models"]
        )
        url = str(data["base_url"]).rstrip("/").removesuffix("/v1") + "/v1"
        return Endpoint(url, str(data["api_key"]), models, data.get("run_id"), data.get("certificate"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); `make up` writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not an endpoint file: {type(error).__name__} {error}") from error


def flags(engine_kwargs: dict[str, Any]) -> list[str]:
    """vLLM's keyword arguments as its command-line flags.

    True and False become `--name` and `--no-name`, mappings JSON, lists several words; None is left out.
    """
    argv: list[str] = []
    for name, value in engine_kwargs.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            argv += [f"--{flag}", json.dumps(value)]
        elif isinstance(value, list | tuple):
            argv += [f"--{flag}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
        else:
            argv += [f"--{flag}", str(value)]
    return argv


def bare_command(model: Model, port: int) -> list[str]:
    """vLLM's own server with the model's arguments on a loopback port. Its access log is off: the harder rival."""
    kwargs = {"served_model_name": model.id} | model.engine_kwargs
    kwargs.pop("api_key", None)
    where = ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags(kwargs), *where]
