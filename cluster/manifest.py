"""Reads a manifest of Ray's cluster launcher and says what is wrong with it, without asking a cloud anything.

`load` goes the launcher's own way: Ray's defaults for the provider (`prepare_config`), then Ray's JSON schema, then what this
project needs of a manifest: the token on every node, our own start commands, a head that runs no model. This is the one file
that reaches into `ray.autoscaler._private`: how defaults are filled in has no public function, and a check that fills them in
differently would pass files that `ray up` refuses. Nothing is started here (`ray_up` does) and nothing is priced (`bill` does).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError, one_line

TOKEN_MOUNT = "~/.ray/auth_token"
HEAD_CPUS = 1  # for the gateway and Serve's controller; a replica of a model asks for more, or for a GPU
OUR_STARTS = {
    "head_start_ray_commands": ("-m cluster head ",),
    "worker_start_ray_commands": ("-m cluster worker ", "--head $RAY_HEAD_IP"),
}
# Ray knows a provider's defaults, except for `external`, where it fails on what is not written.
EXTERNAL_NEEDS: dict[str, Any] = {
    "cluster_synced_files": [],
    "docker": {},
    "file_mounts_sync_continuously": False,
    "head_setup_commands": [],
    "initialization_commands": [],
    "max_workers": 2,
    "rsync_exclude": [],
    "rsync_filter": [],
    "setup_commands": [],
    "worker_setup_commands": [],
}
# What providers read beside the keys that Ray's schema names.
PROVIDER_KEYS = {
    "aws": {"aws_credentials", "key_pair", "use_external_head_ip"},
    "gcp": {"use_external_head_ip"},
    "azure": {"subnet_mask", "unique_id", "use_external_head_ip", "use_node_resource_group"},
}


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of Ray's launcher and not a configuration of ours; what is wrong with it says `load`."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(data, dict) and "cluster_name" in data and "provider" in data


def load(path: Path) -> dict[str, Any]:
    """The manifest with Ray's defaults filled in, as `ray up` sees it before it asks the cloud.

    Raises:
        ConfigError: one line per mistake, each with its path in the file.
    """
    data = _read(path)
    wrong = [
        f"{name}: is missing"
        for name in ("cluster_name", "provider", "head_node_type", "available_node_types")
        if name not in data
    ]
    provider = data.get("provider")
    if not isinstance(provider, dict) or "type" not in provider:
        wrong.append("provider.type: is missing; write aws, gcp, azure or external")
    elif provider["type"] == "external":
        wrong += _external(data)
    if wrong:
        raise _mistakes(path, wrong)
    with _quiet():
        prepared = _prepare(copy.deepcopy(data), path)
    wrong = [*_against_schema(prepared), *_provider_keys(prepared["provider"])]
    wrong += [] if wrong else _aws_machines(prepared)
    wrong += [] if wrong else _ours(prepared)
    if wrong:
        raise _mistakes(path, wrong)
    return prepared


def load_to_start(path: Path) -> dict[str, Any]:
    """As `load`, for a manifest whose files are about to be copied: Ray finds one missing only when the head is up already.

    Raises:
        ConfigError: as `load`; also when something of `file_mounts` is not there. The token may be missing, `up` makes it.
    """
    prepared = load(path)
    wrong = [
        f"file_mounts.{remote}: {local} is not there; run this in the folder that it is in"
        for remote, local in prepared["file_mounts"].items()
        if remote != TOKEN_MOUNT and not Path(local).expanduser().exists()
    ]
    if wrong:
        raise _mistakes(path, wrong)
    return prepared


def ray_command(name: str) -> list[str]:
    """`ray NAME` with this Python, whatever is on the PATH."""
    return [sys.executable, "-m", "ray.scripts.scripts", name]


def up_command(path: Path, yes: bool = True) -> list[str]:
    """The command that makes the cluster, without Ray's cache of what it found in the cloud last time: that may be gone."""
    return [*ray_command("up"), *(["--yes"] if yes else []), "--no-config-cache", str(path)]


def down_command(path: Path, yes: bool = True) -> list[str]:
    """The command that ends it."""
    return [*ray_command("down"), *(["--yes"] if yes else []), str(path)]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping with cluster_name and provider, found {type(data).__name__}")
    return data


def _mistakes(path: Path, lines: list[str]) -> ConfigError:
    return ConfigError("\n".join(f"{path}: {line}" for line in lines))


def _external(data: dict[str, Any]) -> Iterator[str]:
    for name, value in EXTERNAL_NEEDS.items():
        if name not in data:
            yield f"{name}: is missing; Ray has no default for an external provider, write `{name}: {json.dumps(value)}`"
    if "module" not in data["provider"]:
        yield "provider.module: is missing; it names the class, such as cluster.hosts.HostPool"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray remarks on defaults while it fills them in, on standard error and by its logger; they are no mistakes."""
    logger = logging.getLogger("ray.autoscaler")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _prepare(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Ray's defaults, filled in by Ray."""
    from ray.autoscaler._private.util import prepare_config

    try:
        prepared: dict[str, Any] = prepare_config(data)
    except NotImplementedError as error:
        raise _mistakes(path, [f"provider.type: Ray has no provider {data['provider']['type']!r}"]) from error
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        # Ray fills in before it validates: what it stumbles over is best named by the schema.
        wrong = list(_against_schema(data)) or [f"Ray cannot fill in its defaults: {type(error).__name__}: {one_line(error)}"]
        raise _mistakes(path, wrong) from error
    return prepared


def _against_schema(prepared: dict[str, Any]) -> Iterator[str]:
    """Ray's schema, one line per mistake."""
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    for error in jsonschema.Draft7Validator(schema).iter_errors(prepared):
        spot = [str(part) for part in error.absolute_path]
        if error.validator == "additionalProperties":
            known = sorted(error.schema.get("properties", {}))
            for name in sorted(set(error.instance) - set(known)):
                yield f"{'.'.join([*spot, str(name)])}: unknown key; known are {', '.join(known)}"
        elif error.validator == "required":
            for name in sorted(set(error.validator_value) - set(error.instance)):
                yield f"{'.'.join([*spot, name])}: is missing"
        else:
            yield f"{'.'.join(spot) or '(top level)'}: {one_line(error.message)}"


def _provider_keys(provider: dict[str, Any]) -> Iterator[str]:
    """Ray's schema takes anything below `provider`; an external provider checks its own keys."""
    import ray.autoscaler

    if not (more := PROVIDER_KEYS.get(provider["type"])):
        return
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    known = sorted({*schema["properties"]["provider"]["properties"], *more})
    for name in sorted(set(provider) - set(known)):
        yield f"provider.{name}: unknown key; known are {', '.join(known)}"


def _aws_machines(prepared: dict[str, Any]) -> Iterator[str]:
    """AWS's own description of the call that makes a node, where its library is installed; it is asked nothing.

    Ray's schema takes anything below `node_config`, and AWS's library refuses an unknown key only when role, key pair and
    security group have been made.
    """
    if prepared["provider"]["type"] != "aws" or importlib.util.find_spec("botocore") is None:
        return
    from botocore.validate import ParamValidator

    shape = _run_instances()
    for name, entry in prepared["available_node_types"].items():
        asked = {
            key: value for key, value in entry["node_config"].items() if key != "SubnetIds"
        }  # Ray's own, a list to choose from
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **asked}, shape).generate_report()
        for line in report.splitlines():
            yield f"available_node_types.{name}.node_config: {line.partition(', must be one of')[0]}"


@cache
def _run_instances() -> Any:
    """What AWS's library knows about that call."""
    from botocore.loaders import Loader
    from botocore.model import ServiceModel

    return ServiceModel(Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape


def _ours(prepared: dict[str, Any]) -> Iterator[str]:
    """What this project needs beside what Ray accepts."""
    types, head = prepared["available_node_types"], prepared["head_node_type"]
    if head not in types:
        yield f"head_node_type: {head!r} is none of available_node_types ({', '.join(types)})"
        return
    for name, entry in types.items():
        if entry["min_workers"] > entry["max_workers"]:
            least, most = entry["min_workers"], entry["max_workers"]
            yield f"available_node_types.{name}: min_workers ({least}) is larger than max_workers ({most})"
    least = sum(entry["min_workers"] for entry in types.values())
    if least > prepared["max_workers"]:
        yield f"max_workers: {prepared['max_workers']} is smaller than the sum of all min_workers, {least}"
    offered = types[head]["resources"]
    if offered.get("GPU", 0) or offered.get("CPU") is None or offered["CPU"] > HEAD_CPUS:
        where = f"available_node_types.{head}.resources"
        yield f"{where}: the head runs no model; write {{CPU: {HEAD_CPUS}}}, found {json.dumps(offered)}"
    if TOKEN_MOUNT not in prepared.get("file_mounts", {}):
        yield f"file_mounts: every node needs the cluster's token; write `{TOKEN_MOUNT}: {TOKEN_MOUNT}`"
    for name, words in OUR_STARTS.items():
        for word in words:
            if not any(word in line for line in prepared.get(name, [])):
                yield f"{name}: must start the node by our command, with `{word.strip()}` in it"
