"""The guard of Ray's metrics ports: the server that Ray's daemons make asks for the token, in a process as they are started."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from cluster import metrics_guard

# As Ray's agent makes its server, by both names that Ray uses.
DAEMON = textwrap.dedent(
    """
    import sys
    from wsgiref.simple_server import make_server
    import prometheus_client
    from prometheus_client import Gauge, make_wsgi_app
    Gauge("traffic", "secret").set(7)
    agent = make_server("127.0.0.1", 0, make_wsgi_app())
    server, _ = prometheus_client.start_http_server(0, addr="127.0.0.1")
    print(agent.server_port, server.server_port, flush=True)
    agent.serve_forever()
    """
)


@pytest.fixture
def daemon(tmp_path: Path) -> Path:
    """A program where Ray's agent lies."""
    path = tmp_path / "ray" / "dashboard" / "agent.py"
    path.parent.mkdir(parents=True)
    path.write_text(DAEMON)
    metrics_guard.install(tmp_path / "python")
    return path


def environ(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "python"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "t"),
    }


def test_both_servers_ask_for_the_token(daemon: Path, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("rays-token\n")
    process = subprocess.Popen(
        [sys.executable, "-u", str(daemon)], env=environ(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        ports = [int(port) for port in process.stdout.readline().split()]
        assert len(ports) == 2
        token = metrics_guard.metrics_token("rays-token")
        for port in ports:
            for header in ({}, {"Authorization": "Bearer rays-token"}, {"Authorization": f"Basic {token}"}):
                with pytest.raises(HTTPError) as refused:
                    urlopen(Request(f"http://127.0.0.1:{port}/metrics", headers=header), timeout=10)
                assert refused.value.code == 401 and b"traffic" not in refused.value.read()
            asked = Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {token}"})
            assert b"traffic 7.0" in urlopen(asked, timeout=10).read()
    finally:
        process.kill()
        process.communicate()


def test_without_the_token_file_nothing_is_opened(daemon: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(daemon)], env=environ(tmp_path), capture_output=True, text=True, timeout=30)
    assert done.returncode != 0 and done.stdout == "" and "metrics cannot be closed" in done.stderr


def test_other_programs_are_left_alone(tmp_path: Path) -> None:
    metrics_guard.install(tmp_path / "python")
    code = "import sys; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environ(tmp_path), capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_the_daemons_of_the_installed_ray_are_known() -> None:
    """Ray starts them by these paths; a release that moves them would leave their ports open."""
    import importlib.util

    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    for name in metrics_guard.DAEMONS:
        assert (root / name.lstrip("/")).is_file(), name
        assert metrics_guard.is_daemon([sys.executable, "-u", str(root) + name])
    servers = {
        "/" + path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if "tests" not in path.parts and "start_http_server(" in path.read_text() and "prometheus_client" in path.read_text()
    }
    assert servers - set(metrics_guard.DAEMONS) <= {"/dashboard/head.py"}, "head.py is the dashboard's"


def test_the_token_does_not_tell_rays() -> None:
    token = metrics_guard.metrics_token("abc")
    assert len(token) == 64 and "abc" not in token and token == metrics_guard.metrics_token("abc\n")
