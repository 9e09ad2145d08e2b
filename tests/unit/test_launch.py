"""Preflight, the session's files and environment, and the small decisions of `up`, without starting Ray."""

import json
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from cluster import deploy, launch, preflight
from cluster.config import parse
from cluster.errors import LaunchError
from cluster.preflight import free_port
from cluster.session import Session, environment, session_of, start_command, write_private

LONGEST_SOCKET = 107


def config_with(run_dir, **node):
    ports = {name: free_port() for name in ("port", "gcs_port", "dashboard_port", "stats_port", "proxy_metrics_port")}
    model = {"id": "m", "model_source": "/tmp", "device": "cpu", "max_generation_s": 900}
    settings = {**ports, "min_free_memory_mb": 0, "replica_ports": [20000, 20100], **node}
    return parse({"run_dir": str(run_dir), "node": settings, "models": [model]})


def test_a_free_machine_has_no_problems(tmp_path):
    assert preflight.problems(config_with(tmp_path), tmp_path) == []


@pytest.mark.parametrize("name", ["port", "gcs_port", "dashboard_port", "stats_port", "proxy_metrics_port"])
def test_a_busy_port_is_one_line_before_anything_starts(tmp_path, name):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        config = config_with(tmp_path / "run", **{name: holder.getsockname()[1]})
        with pytest.raises(LaunchError, match=f"node.{name}: 127.0.0.1:{getattr(config.node, name)} is in use"):
            launch.up(config, Path("none.yaml"), lambda line: None)
    assert not (tmp_path / "run").exists()


def test_too_little_memory_same_ports_and_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    config = config_with(tmp_path, min_free_memory_mb=10**9, port=18123, gcs_port=18123, replica_ports=[20000, 19000])
    lines = "\n".join(preflight.problems(config, tmp_path / "file" / "run"))
    assert "memory: " in lines and "1000000000 MiB wanted" in lines
    assert "node.gcs_port: port 18123 is also node.port" in lines
    assert "node.replica_ports: [20000, 19000] is not a range" in lines
    assert "cannot be written" in lines


@pytest.mark.parametrize("depth", [0, 30])
def test_sockets_fit_whatever_the_path_of_the_run_directory(depth):
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        session = Session(Path(folder) / ("x" * 4 * depth or "r"))
        session.prepare()
        try:
            proxy = session.short / "h" / ("0" * 56) / "metrics.sock"
            ray = session.short / "ray" / "session_2026-11-23_14-23-44_996694_4194304" / "sockets" / "dash_MetricsHead"
            assert max(len(str(proxy)), len(str(ray))) <= LONGEST_SOCKET
            assert session.short.resolve() == session.run_dir
            assert stat.S_IMODE(session.run_dir.stat().st_mode) == 0o700
            assert stat.S_IMODE(session.token.stat().st_mode) == 0o600
        finally:
            session.unlink()
        assert not session.token.exists()
        assert session.short == session.run_dir or not session.short.is_symlink()


def test_a_link_that_is_not_ours_is_refused(tmp_path):
    session = Session(tmp_path / ("x" * 60))
    session.short.symlink_to("/etc")
    try:
        with pytest.raises(LaunchError, match="leads elsewhere"):
            session.prepare()
        session.unlink()
        assert os.readlink(session.short) == "/etc"
    finally:
        session.short.unlink()


def test_everything_written_goes_below_the_run_directory(tmp_path):
    config = config_with(tmp_path)
    session = session_of(config)
    environ = environment(config, session, "id")
    paths = [
        name for name, value in environ.items() if os.environ.get(name) != value and value.startswith("/") and name != "PATH"
    ]
    outside = {name for name in paths if not environ[name].startswith((str(session.run_dir), str(session.short)))}
    assert outside == {"TIDEPOOL_HAPROXY_BINARY"}
    assert environ["RAY_AUTH_MODE"] == "token"
    assert environ["TIDEPOOL_STORE_URL"] == f"sqlite:///{session.run_dir}/tidepool.db"
    assert int(environ["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 900
    assert environ.get("HF_HOME") == os.environ.get("HF_HOME")
    assert "--node-ip-address=127.0.0.1" in start_command(config, session)
    assert "--dashboard-host=127.0.0.1" in start_command(config_with(tmp_path, host="0.0.0.0"), session)


def test_files_with_secrets_are_private_from_the_first_byte(tmp_path):
    path = tmp_path / "endpoint.json"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "{}")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("{}", 0o600)


def test_down_with_nothing_running(tmp_path):
    said = []
    assert launch.down(Session(tmp_path), said.append) == 0
    assert said == ["nothing was running"]


def test_down_says_when_a_port_is_still_taken(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        (tmp_path / "state.json").write_text(json.dumps({"addresses": [["127.0.0.1", port]]}))
        with pytest.raises(LaunchError, match=f"127.0.0.1:{port} is in use"):
            launch.down(Session(tmp_path), lambda line: None)


def test_the_cause_of_a_failure_is_its_last_exception():
    traceback = "Deploying app failed:\nTraceback (most recent call last):\n  File x\nValueError: model 'x' has no tokenizer\n"
    assert deploy.cause({"message": traceback}) == "ValueError: model 'x' has no tokenizer"
    deployment = {"message": "The deployment failed to start 3 times in a row. Error:\nRuntimeError: Engine core failed\n"}
    assert deploy.cause({"message": "Failed to update", "deployments": {"a": deployment}}) == "RuntimeError: Engine core failed"
    assert deploy.cause({}) == "no reason given"


def test_the_state_of_an_application_is_one_line():
    app = {"status": "DEPLOYING", "deployments": {"LLM:m": {"replicas": [{"state": "STARTING"}, {"state": "RUNNING"}]}}}
    assert deploy.describe(app) == "deploying (LLM 1 running 1 starting)"
