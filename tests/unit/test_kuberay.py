"""The KubeRay files: whole against the operator's own schemas, equal to the project's releases, and at one with each other."""

from __future__ import annotations

import copy
import json
import lzma
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from cluster.config import load

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster" / "manifests" / "kuberay"
SCHEMAS = Path(__file__).parent / "data" / "kuberay-v1.7.0.json.xz"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
WITHOUT_METADATA = ("Kustomization",)
METADATA = {"name", "labels", "annotations"}


@cache
def schemas() -> dict[str, Any]:
    """Schemas by kind; those of plain Kubernetes kinds are cut out of the places where the operator's have them."""
    shipped = json.loads(lzma.decompress(SCHEMAS.read_bytes()))
    cluster = shipped["RayCluster"]["properties"]["spec"]["properties"]
    pod = cluster["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]
    claim = pod["volumes"]["items"]["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    service = shipped["RayService"]["properties"]["spec"]["properties"]["serveService"]["properties"]["spec"]
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]["ingressRules"]
    policy = {
        "properties": {
            "podSelector": rules["items"]["properties"]["from"]["items"]["properties"]["podSelector"],
            "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
            "ingress": rules,
        },
        "required": ["podSelector"],
    }
    image = {"properties": {name: {"type": "string"} for name in ("name", "newName", "newTag", "digest")}, "required": ["name"]}
    kustomization = {
        "namespace": {"type": "string"},
        "resources": {"type": "array", "items": {"type": "string"}},
        "images": {"type": "array", "items": image},
    }
    plain = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
    found = {
        **shipped,
        "PersistentVolumeClaim": {"properties": {**plain, "metadata": {"type": "object"}, "spec": claim}},
        "Service": {"properties": {**plain, "metadata": {"type": "object"}, "spec": service}},
        "NetworkPolicy": {"properties": {**plain, "metadata": {"type": "object"}, "spec": policy}},
        "Kustomization": {"properties": {**plain, **kustomization}},
    }
    return {kind: strict(schema) for kind, schema in found.items()}


def strict(schema: Any) -> Any:
    """A copy in which an object has no other keys than those named. Kubernetes drops the others without a word."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # Below `properties` the keys are names, not words of the schema.
    made = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def mistakes(document: dict[str, Any]) -> list[str]:
    """What the operator would refuse, or drop without saying so."""
    kind = document["kind"]
    found = [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schemas()[kind]).iter_errors(document)]
    if kind not in WITHOUT_METADATA:
        found += [f"metadata.{key}" for key in set(document["metadata"]) - METADATA]
    return found


def cluster_spec(name: str) -> dict[str, Any]:
    document = documents(name)[0]
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterConfig"]


def groups(name: str) -> list[dict[str, Any]]:
    """Head and worker groups."""
    spec = cluster_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods(name: str) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in groups(name)]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    """Ray's: the first."""
    return pod["containers"][0]


CLUSTERS = ["raycluster.yaml", "rayservice.yaml"]


def test_all_files_are_looked_at():
    assert FILES == ["kustomization.yaml", "network.yaml", "raycluster.yaml", "rayjob.yaml", "rayservice.yaml"]
    assert max((FOLDER / name).read_text().count("\n") for name in FILES) < 150


@pytest.mark.parametrize("name", FILES)
def test_every_document_is_as_the_operator_wants_it(name):
    for document in documents(name):
        assert mistakes(document) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("spec", "enableInTreeAutoscalling"), True, "'enableInTreeAutoscalling' was unexpected"),
        (("spec", "authOptions", "secretname"), "x", "'secretname' was unexpected"),
        (
            ("spec", "headGroupSpec", "template", "spec", "containers", 0, "imagePullPolice"),
            "x",
            "'imagePullPolice' was unexpected",
        ),
        (("spec", "workerGroupSpecs", 0, "maxReplica"), 1, "'maxReplica' was unexpected"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "tolerations"), {"key": "x"}, "is not of type 'array'"),
        (("spec", "authOptions", "mode"), "tokens", "is not one of ['disabled', 'token']"),
        (
            ("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"),
            "16GiB",
            "does not match",
        ),
        (("metadata", "lables"), {}, "metadata.lables"),
    ],
)
def test_a_mistake_is_found(path, value, words):
    document = copy.deepcopy(documents("raycluster.yaml")[0])
    spot: Any = document
    for part in path[:-1]:
        spot = spot[part]
    spot[path[-1]] = value
    assert len(found := mistakes(document)) == 1 and words in found[0]


def test_a_mistake_in_a_plain_kind_is_found():
    for kind, key in (("Service", "ports"), ("PersistentVolumeClaim", "accessModes"), ("NetworkPolicy", "ingress")):
        (document,) = [one for name in ("raycluster.yaml", "network.yaml") for one in documents(name) if one["kind"] == kind]
        document["spec"][key + "s"] = document["spec"].pop(key)
        assert any(f"'{key}s' was unexpected" in line for line in mistakes(document)), kind


def pins() -> tuple[str, str]:
    """Our own version and Ray's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = [one for one in map(Requirement, project["dependencies"]) if one.name == "ray"]
    (pin,) = ray.specifier
    assert pin.operator == "=="
    return project["version"], pin.version


@pytest.mark.parametrize("name", CLUSTERS)
def test_releases_are_pyprojects(name):
    ours, rays = pins()
    assert cluster_spec(name)["rayVersion"] == rays
    images = {one["image"] for pod in pods(name) for one in pod["containers"]}
    assert images == {f"tidepool:{ours}-{'train' if name == 'raycluster.yaml' else 'serve'}"}
    assert f"AS {next(iter(images)).rpartition('-')[2]}\n" in (ROOT / "docker" / "Dockerfile").read_text()


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_pod_has_the_token_and_is_nobody_special(name):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token", "secretName": "tidepool-ray-token"}
    for pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        names = {variable["name"] for variable in container(pod)["env"]}
        assert not names & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}, "KubeRay sets them, also in the autoscaler's container"
        assert not any("value" in variable and "secret" in variable["name"].lower() for variable in container(pod)["env"])
        for volume in container(pod)["volumeMounts"]:
            assert volume["name"] in {one["name"] for one in pod["volumes"]}


@pytest.mark.parametrize("name", CLUSTERS)
def test_nodes_come_and_go(name):
    spec = cluster_spec(name)
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}, "the head runs no replica"
    for group in spec["workerGroupSpecs"]:
        wanted = container(group["template"]["spec"])["resources"]
        assert wanted["requests"] == wanted["limits"], "KubeRay tells Ray the limits, Kubernetes places by requests"
        gpus = wanted["limits"].get("nvidia.com/gpu", 0)
        assert group["minReplicas"] == (0 if gpus else 1) and group["maxReplicas"] > group["minReplicas"]
        assert bool(gpus) == any(one["key"] == "nvidia.com/gpu" for one in group["template"]["spec"].get("tolerations", []))


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_pod_starts_by_the_same_configuration(name):
    head, *workers = [container(pod)["command"] for pod in pods(name)]
    assert head[0] == f". docker/pod.sh {'head' if name == 'raycluster.yaml' else 'node'}", (
        "one side deploys: the head, or KubeRay"
    )
    assert {tuple(command) for command in workers} == {(". docker/pod.sh node", head[1])}
    path, *options = head[1].split()
    config = load(ROOT / path, options[1::2])
    assert options[::2] == ["--set"] * (len(options) // 2)
    assert (config.node.port, config.node.gcs_port, config.node.dashboard_port) == (8000, 6379, 8265), "KubeRay's ports"
    assert {port["containerPort"] for port in container(pods(name)[0])["ports"]} >= {8000, 6379, 8265}


def test_what_rayservice_serves_is_what_build_prints():
    """Else: put the printed text there (`python -m serve_apps build ...`)."""
    path, *options = container(pods("rayservice.yaml")[0])["command"][1].split()
    command = [sys.executable, "-m", "serve_apps", "build", path, *options, "--set", "node.host=0.0.0.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    said = documents("rayservice.yaml")[0]["spec"]["serveConfigV2"]
    assert yaml.safe_load(said) == yaml.safe_load(done.stdout), " ".join(command[1:])
    assert "postgresql" not in said


def test_the_job_trains_in_the_cluster():
    spec = documents("rayjob.yaml")[0]["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": documents("raycluster.yaml")[0]["metadata"]["name"]}
    assert "backoffLimit" not in spec, "the operator refuses it beside clusterSelector"
    change, _, command = spec["entrypoint"].partition(" && ")
    assert change == "cd /app" and "WORKDIR /app\n" in (ROOT / "docker" / "Dockerfile").read_text()
    words = command.split()
    assert words[:4] == ["python", "-m", "train", "sft"]
    config = load(ROOT / words[4], words[6::2])
    assert config.train is not None and config.train.output.startswith("s3://")
    assert config.run_dir in (ROOT / "docker" / "pod.sh").read_text(), "the head's run directory, by which it finds the cluster"
    gpus = [container(pod)["resources"]["limits"].get("nvidia.com/gpu", 0) for pod in pods("raycluster.yaml")]
    assert config.train.scale.device == "gpu" and max(gpus) >= config.train.scale.bounds[0]


def test_what_belongs_together_finds_each_other():
    cluster, claim, service = documents("raycluster.yaml")
    assert service["spec"]["selector"] == {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": "head"}
    head = container(pods("raycluster.yaml")[0])
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in head["ports"]}
    (volume,) = pods("raycluster.yaml")[0]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    storage = {one["name"]: one["value"] for one in head["env"]}["RAY_gcs_storage_path"]
    assert storage.startswith(head["volumeMounts"][0]["mountPath"] + "/"), "Ray's books are on the disk that stays"


def test_only_the_endpoint_is_open():
    (policy,) = documents("network.yaml")
    open_to_all = [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert open_to_all == [[{"port": 8000, "protocol": "TCP"}]]
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_the_kustomization_lists_what_is_applied_together():
    (document,) = documents("kustomization.yaml")
    by_hand = {"kustomization.yaml", "rayjob.yaml", "rayservice.yaml"}
    assert set(document["resources"]) == set(FILES) - by_hand
    assert [image["name"] for image in document["images"]] == [container(pods("raycluster.yaml")[0])["image"].partition(":")[0]]
