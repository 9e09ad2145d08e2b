"""The shipped manifests: Ray's schema, the clouds' own descriptions, our rules, mistakes, the bill. Nothing is started."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster import bill, manifest, prices
from cluster.config import load as load_configuration
from cluster.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "aws": ROOT / "cluster.yaml",
    "gcp": ROOT / "cluster/manifests/gcp.yaml",
    "azure": ROOT / "cluster/manifests/azure.yaml",
    "local": ROOT / "cluster/manifests/local.yaml",
}
CLOUDS = ("aws", "gcp", "azure")
FIRST_BOOT_MINUTES = 10  # as the comment at idle_timeout_minutes of cluster.yaml counts it
ENDPOINT = 8000
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@cache
def loaded(name: str) -> dict[str, Any]:
    return manifest.load(FILES[name])


def prepared(name: str) -> dict[str, Any]:
    return copy.deepcopy(loaded(name))


def written(name: str) -> dict[str, Any]:
    return yaml.safe_load(FILES[name].read_text())


def changed(tmp_path: Path, name: str, change: Any) -> Path:
    """A shipped manifest with a mistake in it."""
    data = copy.deepcopy(written(name))
    change(data)
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def commands(data: dict[str, Any]) -> list[str]:
    return [line for name, lines in data.items() if name.endswith("_commands") for line in lines]


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it_and_its_first_line_starts_it(name):
    data = prepared(name)
    assert data["cluster_name"] == "tidepool"
    first = FILES[name].read_text().splitlines()[0]
    assert first.startswith(f"# python -m cluster up {FILES[name].relative_to(ROOT)} ")


def test_configurations_are_not_manifests_and_manifests_are():
    assert all(manifest.is_manifest(path) for path in FILES.values())
    assert not any(manifest.is_manifest(path) for path in (ROOT / "configs").glob("*.yaml"))
    assert not manifest.is_manifest(ROOT / "no-such-file.yaml") and not manifest.is_manifest(ROOT / "README.md")


@pytest.mark.parametrize("name", FILES)
def test_the_head_runs_no_model_and_workers_come_and_go(name):
    data = prepared(name)
    types, head = data["available_node_types"], data["head_node_type"]
    assert types[head]["resources"] == {"CPU": 1}
    gpus = [entry["resources"]["GPU"] for kind, entry in types.items() if kind != head]
    assert set(gpus) == {1, 8}
    assert all(entry["min_workers"] == 0 for entry in types.values())
    assert all(0 < entry["max_workers"] <= data["max_workers"] for kind, entry in types.items() if kind != head)


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_and_on_demand_of_both_sizes_spot_first(name):
    types = prepared(name)["available_node_types"]
    kinds = {(entry["resources"].get("GPU", 0), prices.is_spot(entry)) for entry in types.values()}
    assert kinds == {(0, False), (1, True), (1, False), (8, True), (8, False)}
    for size in (1, 8):
        first, second = sorted((e for e in types.values() if e["resources"].get("GPU") == size), key=lambda e: -e["priority"])
        assert prices.is_spot(first) and not prices.is_spot(second)


@pytest.mark.parametrize("name", CLOUDS)
def test_an_idle_node_outlives_its_boot(name):
    assert prepared(name)["idle_timeout_minutes"] > FIRST_BOOT_MINUTES


@pytest.mark.parametrize("name", FILES)
def test_the_token_is_on_every_node_and_our_commands_turn_it_on(name, tmp_path):
    data = prepared(name)
    assert data["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    from cluster.session import environment, session_of

    for line in (*data["head_start_ray_commands"], *data["worker_start_ray_commands"]):
        assert re.search(r"\.venv/bin/python -m cluster (head|worker) configs/\S+\.yaml\b", line)
        assert "ray start" not in line
    config = load_configuration(ROOT / "configs/qwen3-1gpu.yaml")
    environ = environment(config, session_of(config, str(tmp_path)), "run")
    assert environ["RAY_AUTH_MODE"] == "token" and environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "ray_token")


@pytest.mark.parametrize("name", CLOUDS)
def test_what_the_nodes_run_fits_together(name):
    """The configuration exists and loads as the command line has it; head and workers agree on it and on the run directory."""
    data = prepared(name)
    (head,), (worker,) = data["head_start_ray_commands"], data["worker_start_ray_commands"]
    seen = []
    for line in (head, worker):
        words = line.split()
        sets = [words[number + 1] for number, word in enumerate(words) if word == "--set"]
        path = next(word for word in words if word.startswith("configs/"))
        config = load_configuration(ROOT / path, sets)
        assert config.node.host == "0.0.0.0" and config.node.port == ENDPOINT
        seen.append((path, words[words.index("--run-dir") + 1], words[:4]))
    assert seen[0] == seen[1]
    assert worker.endswith("--head $RAY_HEAD_IP")
    run_dir = seen[0][1]
    assert any(f"mkdir -p {run_dir}" in line for line in data["setup_commands"])


@pytest.mark.parametrize("name", CLOUDS)
def test_the_whole_project_goes_to_every_node_and_nothing_else(name):
    mounts = prepared(name)["file_mounts"]
    ours = {Path(local).name for remote, local in mounts.items() if remote.startswith("~/tidepool/")}
    assert ours == {"pyproject.toml", "setup.sh", "README.md", "configs", "cluster", "serve_apps", "train", "bench"}
    assert all((ROOT / local).exists() for remote, local in mounts.items() if remote.startswith("~/tidepool/"))


@pytest.mark.parametrize("name", CLOUDS)
def test_versions_are_the_projects(name):
    """What is installed is what pyproject.toml and setup.sh say; a version that a manifest names itself must be theirs."""
    data = prepared(name)
    text = "\n".join(commands(data))
    assert "./setup.sh" in text
    uv = re.search(r"^UV_VERSION=(\S+)$", (ROOT / "setup.sh").read_text(), re.MULTILINE)
    assert uv and re.findall(r"uv==(\S+)", text) == [uv[1]] * text.count("uv==")
    python = SpecifierSet(PROJECT["requires-python"])
    assert all(f"{version}.0" in python for version in re.findall(r"python install -q (\S+?)\)", text))
    pins = {Requirement(line).name: Requirement(line) for line in PROJECT["dependencies"]}
    for named, version in re.findall(r"\b([a-z][a-z0-9-]+)==([0-9][^\s'\"]*)", text):
        assert named == "uv" or version in pins[named].specifier, f"{named}=={version}"
    extra = re.findall(r"-e '\.\[(\w+)\]'", text)
    assert set(extra) == {name} and name in PROJECT["optional-dependencies"]


def test_aws_opens_ssh_and_the_endpoint_only():
    """Ray itself adds SSH and the traffic inside the group."""
    rules = written("aws")["provider"]["security_group"]["IpPermissions"]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in rules] == [("tcp", ENDPOINT, ENDPOINT)]


@pytest.mark.parametrize("name", ["gcp", "azure"])
def test_the_commands_that_open_the_endpoint_elsewhere_open_nothing_more(name):
    comment = FILES[name].read_text().partition("\ncluster_name:")[0]
    assert re.findall(r"(?:tcp:|port-ranges )(\d+)", comment) == [str(ENDPOINT)]


def test_the_state_of_the_head_outlives_it():
    head = written("aws")["available_node_types"]["head"]["node_config"]
    state = [disk["Ebs"] for disk in head["BlockDeviceMappings"] if not disk["Ebs"]["DeleteOnTermination"]]
    assert len(state) == 1 and all(disk["Ebs"]["Encrypted"] for disk in head["BlockDeviceMappings"])
    (mount,) = [line for line in written("aws")["head_setup_commands"] if "mkfs" in line]
    assert f"== {state[0]['VolumeSize']} * 1024" in mount, "the disk is known by its size before it has a label"
    assert "/srv/tidepool" in mount
    disks = written("gcp")["available_node_types"]["head"]["node_config"]["disks"]
    (kept,) = [disk for disk in disks if not disk["autoDelete"]]
    (mount,) = [line for line in written("gcp")["head_setup_commands"] if "mkfs" in line]
    assert f"google-{kept['deviceName']}" in mount
    assert all(written(name)["provider"]["cache_stopped_nodes"] for name in CLOUDS)


@pytest.mark.parametrize("name", FILES)
def test_every_command_is_a_shell_command(name):
    for line in commands(prepared(name)):
        done = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_google_knows_every_field_of_its_machines():
    import googleapiclient

    document = Path(googleapiclient.__file__).parent / "discovery_cache/documents/compute.v1.json"
    schemas = json.loads(document.read_text())["schemas"]

    def unknown(value: Any, schema: dict[str, Any], spot: str) -> list[str]:
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        if isinstance(value, dict):
            names, rest = schema.get("properties", {}), schema.get("additionalProperties")
            found = [f"{spot}.{name}" for name in value if name not in names and rest is None]
            return found + [
                line for name in value for line in unknown(value[name], names.get(name) or rest or {}, f"{spot}.{name}")
            ]
        if isinstance(value, list):
            return [line for entry in value for line in unknown(entry, schema.get("items", {}), spot)]
        return [f"{spot}: {value}"] if schema.get("enum") and value not in schema["enum"] else []

    for name, entry in prepared("gcp")["available_node_types"].items():
        assert unknown(entry["node_config"], schemas["Instance"], name) == []


def test_rays_azure_template_knows_every_parameter():
    template = Path(ray.__file__).parent / "autoscaler/_private/_azure/azure-vm-template.json"
    known = set(json.loads(template.read_text())["parameters"]) | {"availability_zone"}
    for entry in prepared("azure")["available_node_types"].values():
        assert set(entry["node_config"]) == {"azure_arm_parameters"}
        assert set(entry["node_config"]["azure_arm_parameters"]) <= known


MISTAKES = [
    (lambda m: m.update(max_worker=3), "max_worker: unknown key"),
    (lambda m: m["provider"].update(regio="us-west-2"), "provider.regio: unknown key"),
    (lambda m: m["provider"].update(type="amazon"), "provider.type: Ray has no provider 'amazon'"),
    (lambda m: m["available_node_types"]["gpu-1"].update(gpus=1), "available_node_types.gpu-1.gpus: unknown key"),
    (lambda m: m["available_node_types"]["gpu-1"]["resources"].update(GPU="one"), "available_node_types.gpu-1.resources.GPU: "),
    (lambda m: m["available_node_types"]["gpu-1"].pop("node_config"), "available_node_types.gpu-1.node_config: is missing"),
    (
        lambda m: m["available_node_types"]["gpu-1"]["node_config"].update(InstanceTyp="g6.xlarge"),
        'available_node_types.gpu-1.node_config: Unknown parameter in input: "InstanceTyp"',
    ),
    (lambda m: m["available_node_types"]["gpu-1"].update(min_workers=9), "min_workers (9) is larger than max_workers (4)"),
    (lambda m: m.update(head_node_type="boss"), "head_node_type: 'boss' is none of"),
    (lambda m: m["available_node_types"]["head"]["resources"].update(CPU=8), "head.resources: the head runs no model"),
    (lambda m: m["available_node_types"]["head"]["resources"].update(GPU=1), "head.resources: the head runs no model"),
    (lambda m: m["file_mounts"].pop("~/.ray/auth_token"), "file_mounts: every node needs the cluster's token"),
    (lambda m: m.update(head_start_ray_commands=["ray start --head"]), "head_start_ray_commands: must start the node by our"),
    (lambda m: m.pop("worker_start_ray_commands"), "worker_start_ray_commands: must start the node by our command"),
    (lambda m: m.pop("provider"), "provider: is missing"),
    (lambda m: m.pop("available_node_types"), "available_node_types: is missing"),
]


@pytest.mark.parametrize(("change", "line"), MISTAKES, ids=[line for _, line in MISTAKES])
def test_a_mistake_is_named_with_its_path(tmp_path, change, line):
    path = changed(tmp_path, "aws", change)
    with pytest.raises(ConfigError) as raised:
        manifest.load(path)
    lines = str(raised.value).splitlines()
    assert any(line in said for said in lines), lines
    assert all(said.startswith(f"{path}: ") for said in lines)


def test_an_unknown_key_is_one_line_on_the_terminal_and_nothing_starts(tmp_path):
    path = changed(tmp_path, "aws", lambda m: m.update(idle_timeout=3))
    done = run("up", str(path))
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"{path}: idle_timeout: unknown key; known are" in line and "idle_timeout_minutes" in line


@pytest.mark.parametrize("missing", ["head_setup_commands", "cluster_synced_files"])
def test_what_ray_needs_of_an_external_provider_is_asked_for(tmp_path, missing):
    path = changed(tmp_path, "local", lambda m: m.pop(missing))
    with pytest.raises(ConfigError, match=f"{missing}: is missing; Ray has no default"):
        manifest.load(path)


def test_a_file_that_is_none(tmp_path):
    for text, said in (("a: [", "is not YAML"), ("- 1", "must be a mapping")):
        (tmp_path / "m.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            manifest.load(tmp_path / "m.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        manifest.load(tmp_path / "no-such.yaml")


def test_files_that_are_to_be_copied_must_be_there(tmp_path, monkeypatch):
    manifest.load_to_start(FILES["aws"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"file_mounts.~/tidepool/setup.sh: setup.sh is not there; run this in the folder"):
        manifest.load_to_start(FILES["aws"])
    assert manifest.load(FILES["aws"]), "`down` must work from anywhere"


def test_the_bill_adds_up():
    found = bill.bill(prepared("aws"))
    assert (found.head.machine, found.head.each) == ("m7i.xlarge", prices.PER_HOUR["m7i.xlarge"])
    each = {item.name: item.each for item in found.workers}
    assert each["gpu-1"] == prices.PER_HOUR["g6e.2xlarge"]
    assert each["gpu-1-spot"] == pytest.approx(prices.PER_HOUR["g6.2xlarge"] * prices.SPOT_SHARE)
    dearest = each["gpu-8"] + each["gpu-8-spot"] + 4 * each["gpu-1"]
    assert found.max_workers == 6
    assert found.most == pytest.approx(found.head.each + dearest)


@pytest.mark.parametrize("name", FILES)
def test_every_machine_of_a_shipped_manifest_has_a_price(name):
    assert bill.bill(prepared(name)).unknown == ()


def test_an_unknown_machine_is_said_and_not_guessed():
    data = prepared("aws")
    data["available_node_types"]["gpu-1"]["node_config"]["InstanceType"] = "x99.huge"
    found = bill.bill(data)
    assert found.unknown == ("x99.huge",)
    text = "\n".join(bill.lines(found))
    assert "one unknown" in text and "no price noted for: x99.huge" in text


def test_own_machines_cost_what_their_manifest_says():
    assert prices.hourly_price({"node_config": {}, "resources": {}}) == 0.0
    assert prices.hourly_price({"node_config": {"price_per_hour": 0.35}}) == 0.35
    assert prices.hourly_price({"node_config": {"InstanceType": "g6.xlarge", "price_per_hour": 0.5}}) == 0.5
    assert prices.hourly_price({"node_config": {"InstanceType": "x99.huge"}}) is None


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command as an operator without any account runs it; whatever it asks of AWS would fail."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "PYTHONPATH"))}
    return subprocess.run(
        [sys.executable, "-m", "cluster", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env=kept | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_EC2_METADATA_DISABLED": "true"} | environ,
    )  # fmt: skip


def test_a_dry_run_shows_command_and_cost_and_starts_nothing(tmp_path):
    done = run("up", "--dry-run", "cluster.yaml", HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    words = " ".join(manifest.up_command(Path("cluster.yaml")))
    assert words == f"{sys.executable} -m ray.scripts.scripts up --yes --no-config-cache cluster.yaml"
    assert lines[0] == "would run:"
    assert lines[1] == f"  PYTHONPATH={ROOT} RAY_UP_enable_autoscaler_v2=1 RAY_USAGE_STATS_ENABLED=0 {words}"
    assert prices.NOTED in lines[2] and "check your provider's" in lines[2]
    assert re.search(r"^  head +m7i\.xlarge +one +0\.20 +at most 1: +0\.20$", done.stdout, re.MULTILINE)
    assert re.search(r"^  gpu-1-spot +g6\.2xlarge +one +~0\.39 +at most 4: +~1\.56$", done.stdout, re.MULTILINE)
    assert "the head alone 0.20; the most in all, with max_workers 6: 94.48" in done.stdout
    assert list(tmp_path.iterdir()) == [], "no token, no key, nothing"
