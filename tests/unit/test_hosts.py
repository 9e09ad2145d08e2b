"""The host pool without hosts: an `ssh` of our own on the PATH runs each command here, with a home folder per address.

The real thing, over sshd and Ray's autoscaler, is in tests/cluster.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, LaunchError
from cluster.hosts import HostPool, address_of
from cluster.pool import pool, ssh_command, unreachable

HEAD = {"ray-node-type": "head", "ray-user-node-type": "head"}
WORKER = {"ray-node-type": "worker", "ray-user-node-type": "gpu-1"}
SSH = """#!/bin/sh
for word in "$@"; do last=$word; case $word in *@*) target=$word;; esac; done
address=${target#*@}
echo "$address $last" >> "$POOL/ssh.log"
test -e "$POOL/$address" || { echo "ssh: connect to host $address port 22: No route to host" >&2; exit 255; }
HOME="$POOL/$address" exec sh -c "$last"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the hosts' homes; `operator` is the home of this process."""
    for name in ("operator", "h0", "w1", "w2"):
        (tmp_path / name / ".ray").mkdir(parents=True)
        (tmp_path / name / ".ray" / "auth_token").write_text("t")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(SSH)
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("POOL", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "operator"))
    yield tmp_path


def at(node_ids: Iterable[str]) -> list[str]:
    """Addresses of nodes."""
    return [address_of(node_id) for node_id in node_ids]


def provider(**more: Any) -> dict[str, Any]:
    hosts = [{"address": "h0", "node_type": "head"}, *({"address": f"w{n}", "node_type": "gpu-1"} for n in (1, 2))]
    auth = {"ssh_user": "me", "ssh_private_key": "~/key"}
    return {"type": "external", "stop": "echo stopped >> ~/stopped", "hosts": hosts, "auth": auth, **more}


def on_head(place: Path, monkeypatch: pytest.MonkeyPatch, operator: HostPool) -> HostPool:
    """The pool as the head's autoscaler makes it from the manifest that `ray up` brought there."""
    told = operator.prepare_for_head_node({"provider": provider(), "auth": provider()["auth"]})
    assert told["provider"]["auth"]["ssh_private_key"] == "~/ray_bootstrap_key.pem"
    monkeypatch.setenv("HOME", str(place / "h0"))
    return HostPool(told["provider"], "tide")


def test_hosts_are_taken_by_type_and_given_back(place: Path) -> None:
    hosts = HostPool(provider(), "tide")
    assert hosts.non_terminated_nodes({}) == []
    one, two = hosts.create_node({}, WORKER, 2)
    assert at([one, two]) == ["w1", "w2"]
    assert hosts.non_terminated_nodes({"ray-user-node-type": "gpu-1"}) == [one, two]
    assert hosts.is_running(one) and hosts.internal_ip(one) == "w1"
    hosts.set_node_tags(one, {"ray-node-status": "up-to-date"})
    assert hosts.node_tags(one) == {**WORKER, "ray-node-status": "up-to-date"}
    hosts.terminate_nodes([one])
    assert hosts.is_terminated(one) and hosts.non_terminated_nodes({}) == [two]
    assert (place / "w1" / "stopped").read_text() == "stopped\n" and not (place / "w2" / "stopped").exists()
    hosts.terminate_nodes([two])
    assert list((place / "operator" / ".ray").iterdir()) == [place / "operator" / ".ray" / "auth_token"], "no state is left"


def test_a_silent_host_is_passed_over_and_too_few_are_said(place: Path) -> None:
    (place / "w1" / ".ray" / "auth_token").unlink()
    (place / "w1" / ".ray").rmdir()
    (place / "w1").rmdir()
    hosts = HostPool(provider(), "tide")
    assert at(hosts.create_node({}, WORKER, 1)) == ["w2"]
    with pytest.raises(Exception, match="no free host of type gpu-1: all of this type are taken"):
        hosts.create_node({}, WORKER, 1)
    assert at(hosts.non_terminated_nodes({})) == ["w2"]
    fresh = HostPool(provider(hosts=[{"address": "w1", "node_type": "gpu-1"}]), "other")
    with pytest.raises(Exception, match="no free host of type gpu-1: w1: ssh: connect to host w1 port 22: No route to host"):
        fresh.create_node({}, WORKER, 1)


def test_the_operator_learns_from_the_head_what_is_to_be_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = HostPool(provider(), "tide")
    operator.create_node({}, HEAD, 1)
    head = on_head(place, monkeypatch, operator)
    assert head.non_terminated_nodes({}) == operator.non_terminated_nodes({}) and at(head.non_terminated_nodes({})) == ["h0"]
    (worker,) = head.create_node({}, WORKER, 1)
    for name in ("ray_bootstrap_key.pem", "ray_bootstrap_config.yaml"):
        (place / "h0" / name).write_text("secret")
    monkeypatch.setenv("HOME", str(place / "operator"))
    assert operator.nodes_for_teardown({"ray-node-type": "worker"}) == [worker]
    (head_id,) = operator.nodes_for_teardown({"ray-node-type": "head"})
    assert at([worker, head_id]) == ["w1", "h0"]
    head_commands = len((place / "ssh.log").read_text().splitlines())
    operator.terminate_nodes([worker, head_id])
    stops = [line.split()[0] for line in (place / "ssh.log").read_text().splitlines()[head_commands:] if "stopped" in line]
    assert stops == ["h0", "w1"], "the head first"
    assert operator.nodes_for_teardown({"ray-node-type": "worker"}) == []
    assert [path.name for path in (place / "h0").rglob("*") if path.is_file()] == ["stopped", "auth_token"]
    assert not (place / "w2" / "stopped").exists()


def test_a_stop_that_fails_keeps_the_host(place: Path) -> None:
    hosts = HostPool(provider(stop="echo no such thing >&2; false"), "tide")
    (node,) = hosts.create_node({}, WORKER, 1)
    with pytest.raises(LaunchError, match=r"w1: .* failed: no such thing"):
        hosts.terminate_nodes([node])
    assert hosts.non_terminated_nodes({}) == [node]


def test_a_host_that_is_taken_again_is_another_node(place: Path) -> None:
    """Else Ray's autoscaler takes the new node for the old one, which it is ending, and waits for both."""
    hosts = HostPool(provider(), "tide")
    (first,) = hosts.create_node({}, WORKER, 1)
    hosts.terminate_nodes([first])
    (second,) = hosts.create_node({}, WORKER, 1)
    assert at([first, second]) == ["w1", "w1"] and first != second
    hosts.terminate_nodes([first])
    assert hosts.non_terminated_nodes({}) == [second], "a late end of the old node does not end the new one"


def test_power_commands_run_before_and_after(place: Path) -> None:
    home = place / "w3"
    entry = {"address": "w3", "node_type": "gpu-1", "power_on": f"mkdir -p {home}/.ray", "power_off": f"mv {home} {home}.off"}
    hosts = HostPool(provider(hosts=[entry]), "tide")
    nodes = hosts.create_node({}, WORKER, 1)
    assert home.is_dir()
    hosts.terminate_nodes([*nodes])
    assert not home.exists() and (place / "w3.off").is_dir()
    broken = HostPool(provider(hosts=[{**entry, "power_on": "echo no power >&2; exit 3"}]), "tide")
    with pytest.raises(Exception, match=r"w3: power_on failed \(no power\)"):
        broken.create_node({}, WORKER, 1)


def test_state_is_shared_by_processes(place: Path) -> None:
    one, other = HostPool(provider(), "tide"), HostPool(provider(), "tide")
    one.create_node({}, WORKER, 1)
    assert at(other.create_node({}, WORKER, 1)) == ["w2"]
    assert at(json.loads((place / "operator" / ".ray" / "tidepool-tide.json").read_text())) == ["w1", "w2"]


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        (None, "provider.hosts: list the machines"),
        ([{"address": "a"}], "provider.hosts.0.node_type: is missing"),
        ([{"address": "a", "node_type": "x", "adress": 1}], "provider.hosts.0.adress: unknown key"),
        (["a"], "provider.hosts.0: write"),
        ([{"address": "a", "node_type": "x"}] * 2, "provider.hosts: a is listed twice"),
    ],
)
def test_mistakes_are_named(hosts: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pool({"stop": "true", "hosts": hosts})
    with pytest.raises(ConfigError, match=r"provider\.stop: is missing"):
        pool({"hosts": [{"address": "a", "node_type": "x"}]})


def test_ssh_goes_as_rays_launcher_goes(place: Path) -> None:
    words = ssh_command(provider(), "w1", "true")
    assert words[0] == "ssh" and words[-2:] == ["me@w1", "true"] and str(place / "operator" / "key") in words
    assert unreachable(provider(), "w1") is None
    assert unreachable(provider(), "nowhere") == "ssh: connect to host nowhere port 22: No route to host"
