"""No secret of a live cluster, and no prompt, is where people look: logs, Serve's dump, printed configurations, command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import CHAT, chat, internal_secret, request
from conftest import CONFIG, ROOT, Endpoint

from cluster.processes import marked

PRIVATE = {"endpoint.json", "keys.json", "ray_token", "metrics_token", "tidepool.db", "tidepool.db-wal", "tidepool.db-shm"}


@pytest.fixture(scope="module")
def secrets(endpoint: Endpoint) -> dict[str, bytes]:
    """Every secret there is, by what it is; prompts and wrong keys are sent first, to have their chance to be logged."""
    prompt, guess, entered = (f"canary{uuid.uuid4().hex}" for _ in range(3))
    assert chat(endpoint.root, endpoint.api_key, prompt).status == 200
    assert chat(endpoint.root, endpoint.api_key, prompt + " x" * 4000).status == 400, "longer than the model takes"
    assert chat(endpoint.root, endpoint.api_key, prompt, temperature="hot").status == 400
    assert chat(endpoint.root, guess).status == 401
    assert (
        request(endpoint.root, "POST", f"/engines/{CHAT}/v1/completions", entered, {"model": CHAT, "prompt": prompt}).status
        == 403
    )
    return {
        "api key": endpoint.api_key.encode(),
        "admin key": endpoint.admin_key.encode(),
        "Ray's token": (endpoint.run_dir / "ray_token").read_bytes().strip(),
        "metrics token": (endpoint.run_dir / "metrics_token").read_bytes().strip(),
        "internal secret": internal_secret(endpoint).encode(),
        "prompt": prompt.encode(),
        "wrong key": guess.encode(),
        "key sent to an engine": entered.encode(),
    }


def held(secrets: dict[str, bytes], text: bytes) -> list[str]:
    return [name for name, secret in secrets.items() if secret in text]


def files(endpoint: Endpoint) -> Iterator[Path]:
    for file in endpoint.run_dir.rglob("*"):
        if file.is_file() and not file.is_symlink():
            yield file


def test_the_secrets_are_secrets(secrets: dict[str, bytes]) -> None:
    assert all(len(secret) >= 32 for secret in secrets.values()) and len(set(secrets.values())) == len(secrets)


def test_no_log_has_one(endpoint: Endpoint, secrets: dict[str, bytes]) -> None:
    logs = [file for file in files(endpoint) if file.suffix in (".log", ".out", ".err") or "logs" in file.parts]
    assert len(logs) > 20 and any(file.name == "up.log" for file in logs)
    assert {str(file): names for file in logs if (names := held(secrets, file.read_bytes()))} == {}


def test_what_holds_one_is_its_owners_alone(endpoint: Endpoint, secrets: dict[str, bytes]) -> None:
    holders = {file: names for file in files(endpoint) if (names := held(secrets, file.read_bytes()))}
    known = {file for file in holders if file.name in PRIVATE or file.parent.name == "tmp"}
    assert {str(file): holders[file] for file in holders.keys() - known} == {}
    assert [str(file) for file in known if file.stat().st_mode & 0o077] == []
    assert [
        name for names in holders.values() for name in names if name in ("prompt", "wrong key", "key sent to an engine")
    ] == []


def test_serves_own_dump_has_none(endpoint: Endpoint, secrets: dict[str, bytes]) -> None:
    token = (endpoint.run_dir / "ray_token").read_text().strip()
    _, dashboard = json.loads((endpoint.run_dir / "state.json").read_text())["addresses"][2]
    for path in (
        "/api/serve/applications/",
        "/api/v0/actors?detail=1",
        "/api/jobs/",
        "/api/v0/nodes?detail=1",
        "/api/v0/workers?detail=1",
    ):
        answer = request(f"http://127.0.0.1:{dashboard}", "GET", path, token)
        assert answer.status == 200 and len(answer.body) > 2, (path, answer.status)
        assert held(secrets, answer.body) == [], path


def test_what_our_commands_print_has_none(endpoint: Endpoint, secrets: dict[str, bytes]) -> None:
    run_dir = ["--run-dir", str(endpoint.run_dir)]
    (_, port), _, (_, dashboard), *_ = json.loads((endpoint.run_dir / "state.json").read_text())["addresses"]
    for words in (
        ["cluster", "check", str(CONFIG), *run_dir, "--fast"],
        ["cluster", "status", str(CONFIG), *run_dir, "--set", f"node.port={port}", "--set", f"node.dashboard_port={dashboard}"],
        ["cluster", "keys", "list", *run_dir],
        ["cluster", "usage", *run_dir],
        ["serve_apps", "build", str(CONFIG)],
    ):
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, timeout=120)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        assert held(secrets, done.stdout + done.stderr) == [], words


def test_no_command_line_has_one(endpoint: Endpoint, secrets: dict[str, bytes]) -> None:
    seen = 0
    for process in marked(endpoint.run_dir):
        try:
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        seen += 1
        assert held(secrets, command) == [], command
        # The environment is its owner's alone, as /proc has it; but children and crash reports inherit it.
        assert held(secrets, environment) == [], process.title
    assert seen > 10


def test_no_shared_place_has_one(endpoint: Endpoint, secrets: dict[str, bytes]) -> None:
    """What a cluster leaves in the machine's shared folders: memory files of Ray's object store among them."""
    started = (endpoint.run_dir / "ray_token").stat().st_mtime
    for folder in (Path("/dev/shm"), Path("/tmp")):
        for file in folder.iterdir():
            if file.is_file() and not file.is_symlink() and file.stat().st_mtime >= started and os.access(file, os.R_OK):
                state = file.stat()
                if state.st_mode & 0o077 and state.st_size < 2**28:
                    assert held(secrets, file.read_bytes()) == [], file
