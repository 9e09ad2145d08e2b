"""`up` of cluster.yaml against a pretended AWS on this machine, up to the first SSH: what it asks for, and that it takes it back.

The launcher, Ray's AWS provider and boto3 are real; EC2 and IAM are moto's server on the loopback address, with a note taken of
every call. `ssh` and `rsync` are programs that write down how they were called and fail, so nothing leaves the machine. Ray's
autoscaler asks for workers by the same call of the provider as for the head; each worker type is seen here in the head's place.
"""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import yaml
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from cluster.manifest import up_command

# Ray waits half a minute for a new role to be known everywhere.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = yaml.safe_load((ROOT / "cluster.yaml").read_text())
TYPES = MANIFEST["available_node_types"]
WORKERS = [name for name in TYPES if name != MANIFEST["head_node_type"]]
Started = tuple[subprocess.CompletedProcess[str], Path]
READS = ("Describe", "Get", "List")
FAILING = "#!/bin/sh\necho \"$(basename $0) $*\" >> '{log}'\nexit 255\n"


class Cloud:
    """EC2 and IAM on a free port of this machine; `calls` is what was asked, one flat mapping each."""

    def __init__(self) -> None:
        self.calls: list[dict[str, str]] = []
        self._server = make_server("127.0.0.1", 0, self._noting(DomainDispatcherApplication(create_backend_app)), threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _noting(self, app: Callable[..., Any]) -> Callable[..., Any]:
        def noted(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
            fields = {name: values[0] for name, values in parse_qs(body.decode(), keep_blank_values=True).items()}
            if "Action" in fields:
                self.calls.append(fields)
            return app(environ, start_response)

        return noted

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def changes(self) -> list[str]:
        """The actions that change something, in order."""
        return [call["Action"] for call in self.calls if not call["Action"].startswith(READS)]

    def run_of(self, node_type: str) -> dict[str, str]:
        """The call that asks for machines of a node type."""
        calls = [call for call in self.calls if call["Action"] == "RunInstances"]
        found = [call for call in calls if tags_of(call, "instance").get("ray-user-node-type") == node_type]
        assert len(found) == 1, f"{len(found)} calls for {node_type}"
        return found[0]

    def only(self, action: str) -> dict[str, str]:
        found = [call for call in self.calls if call["Action"] == action]
        assert len(found) == 1, f"{len(found)} calls of {action}"
        return found[0]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with pytest.MonkeyPatch.context() as settings:
        settings.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
        made = Cloud()
        yield made
        made.close()


def operator(home: Path, cloud: Cloud) -> dict[str, str]:
    """The environment of somebody with an AWS account, whose SSH reaches nobody."""
    tools = home / "bin"
    tools.mkdir(parents=True)
    for name in ("ssh", "rsync"):
        (tools / name).write_text(FAILING.format(log=home / "called"))
        (tools / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "TIDEPOOL_"))}
    return kept | {
        "HOME": str(home),
        "TMPDIR": str(home),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "AWS_ENDPOINT_URL": cloud.url,
        "AWS_ACCESS_KEY_ID": "made-up",
        "AWS_SECRET_ACCESS_KEY": "made-up",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AUTOSCALER_NODE_START_WAIT_S": "1",
        "NO_PROXY": "127.0.0.1",
    }


def asked_for(call: dict[str, str], prefix: str) -> dict[str, str]:
    """The fields of a call below a name, without it."""
    return {name.removeprefix(prefix): value for name, value in call.items() if name.startswith(prefix)}


def tags_of(call: dict[str, str], kind: str) -> dict[str, str]:
    """The tags that a call gives to a kind of resource."""
    found = {}
    for number in range(1, 9):
        spec = asked_for(call, f"TagSpecification.{number}.")
        if spec.get("ResourceType") == kind:
            found |= {spec[f"Tag.{n}.Key"]: spec[f"Tag.{n}.Value"] for n in range(1, 30) if f"Tag.{n}.Key" in spec}
    return found


def disks(*expected: tuple[str, int, str]) -> dict[str, str]:
    """The fields of disks, each a device, its GiB, and whether it goes with the machine."""
    found = {}
    for number, (device, size, deleted) in enumerate(expected, 1):
        found |= {f"{number}.DeviceName": device, f"{number}.Ebs.VolumeSize": str(size), f"{number}.Ebs.VolumeType": "gp3"}
        found |= {f"{number}.Ebs.Encrypted": "true", f"{number}.Ebs.DeleteOnTermination": deleted}
    return found


@pytest.fixture(scope="module")
def started(cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """The operator's `up`, once."""
    home = tmp_path_factory.mktemp("operator")
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "up", "cluster.yaml"],
        cwd=ROOT, env=operator(home, cloud), capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    return done, home


def test_what_is_changed_in_the_account_in_order(cloud: Cloud, started: Started) -> None:
    assert cloud.changes() == [
        "CreateInstanceProfile",
        "CreateRole",
        "AttachRolePolicy",
        "AttachRolePolicy",
        "AddRoleToInstanceProfile",
        "CreateKeyPair",
        "CreateSecurityGroup",
        "AuthorizeSecurityGroupIngress",
        "RunInstances",
        "CreateTags",  # waiting for SSH
        "CreateTags",  # which does not come
        "StopInstances",  # taken back
    ]


def test_the_head_that_is_asked_for(cloud: Cloud, started: Started) -> None:
    call = cloud.run_of("head")
    assert call["InstanceType"] == "m7i.xlarge" and (call["MinCount"], call["MaxCount"]) == ("1", "1")
    assert call["ImageId"] == TYPES["head"]["node_config"]["ImageId"]
    assert not asked_for(call, "InstanceMarketOptions.")
    assert call["IamInstanceProfile.Arn"].endswith(":instance-profile/ray-autoscaler-v1")
    assert asked_for(call, "MetadataOptions.") == {"HttpTokens": "required", "HttpPutResponseHopLimit": "1"}
    assert asked_for(call, "BlockDeviceMapping.") == disks(("/dev/sda1", 120, "true"), ("/dev/sdf", 50, "false"))
    tags = tags_of(call, "instance")
    assert {name: tags[name] for name in ("project", "ray-cluster-name", "ray-node-type", "ray-user-node-type")} == {
        "project": "tidepool",
        "ray-cluster-name": "tidepool",
        "ray-node-type": "head",
        "ray-user-node-type": "head",
    }
    assert tags_of(call, "volume") == {"project": "tidepool"}


def test_what_may_come_in(cloud: Cloud, started: Started) -> None:
    group = cloud.only("CreateSecurityGroup")
    assert group["GroupName"] == "tidepool"
    call = cloud.only("AuthorizeSecurityGroupIngress")
    rules = [asked_for(call, f"IpPermissions.{number}.") for number in range(1, 9)]
    outside = {(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in rules if "IpRanges.1.CidrIp" in rule}
    assert outside == {("tcp", "22", "22"), ("tcp", "8000", "8000")}
    inside = [rule for rule in rules if rule and "IpRanges.1.CidrIp" not in rule]
    assert [rule["Groups.1.GroupId"] for rule in inside] == [call["GroupId"]], "the group itself and nobody else"
    assert cloud.run_of("head")["SecurityGroupId.1"] == call["GroupId"]


def test_nothing_but_ssh_is_tried_and_the_failure_is_one_line(cloud: Cloud, started: Started) -> None:
    done, home = started
    called = (home / "called").read_text().splitlines()
    assert called and all(line.startswith("ssh ") and "ubuntu@" in line for line in called)
    key = home / ".ssh" / "ray-autoscaler_us-west-2.pem"
    assert str(key) in called[0] and key.stat().st_mode & 0o777 == 0o600
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] and "Traceback" not in done.stderr


def test_each_worker_type_is_asked_for_as_it_is_written(cloud: Cloud, started: Started, tmp_path: Path) -> None:
    """The other types in the head's place, all at once; the account has its role, key and group by now."""
    environ = operator(tmp_path, cloud)
    shutil.copytree(started[1] / ".ssh", tmp_path / ".ssh")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("made-up")
    before = len(cloud.calls)
    running = []
    for name in WORKERS:
        manifest = copy.deepcopy(MANIFEST) | {"cluster_name": name, "head_node_type": name}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(manifest))
        command = up_command(tmp_path / f"{name}.yaml")
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    said = [process.communicate(timeout=200)[0].decode() for process in running]
    assert {call["Action"] for call in cloud.calls[before:] if not call["Action"].startswith(READS)} == {
        "RunInstances",
        "CreateTags",
    }
    for name, text in zip(WORKERS, said, strict=True):
        assert "Launched a new head node" in text, text[-2000:]
        call, written = cloud.run_of(name), TYPES[name]["node_config"]
        assert call["InstanceType"] == written["InstanceType"]
        spot = {"MarketType": "spot", "SpotOptions.SpotInstanceType": "one-time"}
        spot |= {"SpotOptions.InstanceInterruptionBehavior": "terminate"}
        assert asked_for(call, "InstanceMarketOptions.") == (spot if name.endswith("-spot") else {})
        size = written["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"]
        assert asked_for(call, "BlockDeviceMapping.").items() >= disks(("/dev/sda1", size, "true")).items()
        assert tags_of(call, "instance")["project"] == tags_of(call, "volume")["project"] == "tidepool"
        assert call["SecurityGroupId.1"] == cloud.run_of("head")["SecurityGroupId.1"]
    seen = {name: (cloud.run_of(name)["InstanceType"], TYPES[name]["resources"]["GPU"]) for name in WORKERS}
    assert seen == {
        "gpu-1-spot": ("g6.2xlarge", 1),
        "gpu-1": ("g6e.2xlarge", 1),
        "gpu-8-spot": ("p5.48xlarge", 8),
        "gpu-8": ("p5en.48xlarge", 8),
    }
