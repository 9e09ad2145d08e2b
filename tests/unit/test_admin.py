"""The commands `keys` and `usage` against an HTTP server with a real store behind the gateway's `/admin` routes."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from cluster import admin
from cluster.database import default_url
from cluster.errors import LaunchError, StoreError
from cluster.records import KeySpec, UsageRow, hash_secret
from cluster.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(default_url(tmp_path))
    yield opened
    opened.close()


@pytest.fixture
def run_dir(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run directory whose endpoint.json names the server."""
    admin_key = store.ensure_admin_key()

    class Routes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._refused():
                return
            url = urlsplit(self.path)
            if url.path == "/admin/keys":
                return self._reply(200, {"data": [record.public() for record in store.list_keys()]})
            asked = {name: values[0] for name, values in parse_qs(url.query).items()}
            since, until = (float(asked[name]) if name in asked else None for name in ("since", "until"))
            totals = store.usage(since, until, asked.get("key"), asked.get("model"))
            self._reply(200, {"data": [asdict(total) for total in totals], "total_usd": sum(total.cost_usd for total in totals)})

        def do_POST(self) -> None:
            if self._refused():
                return
            record, secret = store.create_key(KeySpec.parse(json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self._reply(201, {"key": secret, **record.public()})

        def do_DELETE(self) -> None:
            if self._refused():
                return
            try:
                self._reply(200, store.revoke_key(unquote(self.path.removeprefix("/admin/keys/"))).public())
            except StoreError as error:
                self._reply(
                    404, {"error": {"message": str(error), "type": "not_found_error", "param": None, "code": "not_found"}}
                )

        def log_message(self, *args: object) -> None:
            pass

        def _refused(self) -> bool:
            if self.headers["authorization"] == f"Bearer {admin_key}":
                return False
            self._reply(401, {"error": {"message": "This is no live key.", "type": "authentication_error"}})
            return True

        def _reply(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    for name in ("TIDEPOOL_BASE_URL", "TIDEPOOL_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # must not be asked for an address on this machine
    with ThreadingHTTPServer(("127.0.0.1", 0), Routes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        described = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "admin_key": admin_key}
        (tmp_path / "endpoint.json").write_text(json.dumps(described))
        yield tmp_path
        server.shutdown()


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    admin.add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args(words)
    return int(args.run(args))


def test_keys_are_made_listed_and_revoked(run_dir: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--run-dir", str(run_dir))
    limits = ("--rpm", "60", "--max-parallel", "2", "--models", "a,b", "--expires", "30d", "--budget", "2.5")
    assert run("keys", "create", "ann", *limits, *where) == 0
    secret = capsys.readouterr().out.split("\n")[1]
    record = store.find_key(hash_secret(secret))
    assert record is not None and (record.name, record.rpm, record.tpm, record.models) == ("ann", 60, None, ("a", "b"))
    assert record.expires_at == pytest.approx(time.time() + 30 * 86_400, abs=60) and record.budget_usd == 2.5

    assert run("keys", "list", *where) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.find("live") == head.find("STATE") for line in lines)
    assert secret not in "".join(lines)

    assert run("keys", "revoke", record.id, *where) == 0
    capsys.readouterr()
    assert run("keys", "list", "--json", *where) == 0
    assert [key["name"] for key in json.loads(capsys.readouterr().out)["data"]] == ["admin"]
    assert run("keys", "list", "--all", *where) == 0
    assert "revoked" in capsys.readouterr().out


def test_usage_is_a_table_with_money(run_dir: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    record, _ = store.create_key(KeySpec(name="ann"))
    now = int(time.time())
    rows = [
        UsageRow(key_id=record.id, model="m", window_start=now, requests=4, latency_s=2.0, cost_usd=0.25),
        UsageRow(key_id=record.id, model="m", window_start=now - 7200, requests=1, cost_usd=1.0),
    ]
    store.record_usage("b", rows)
    where = ("--run-dir", str(run_dir))
    assert run("usage", "--since", "1h", *where) == 0
    out = capsys.readouterr().out
    assert "ann" in out and "0.500" in out and out.endswith("total: 0.250000 US dollars\n")
    assert run("usage", "--until", "1h", "--json", *where) == 0
    assert json.loads(capsys.readouterr().out)["total_usd"] == 1.0
    assert run("usage", "--key", "key_other", *where) == 0
    assert capsys.readouterr().out.endswith("total: 0.000000 US dollars\n")


def test_mistakes_are_one_line(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = ("--run-dir", str(run_dir))
    with pytest.raises(StoreError, match=r"404: key 'key_x/\.\.' does not exist"):
        run("keys", "revoke", "key_x/..", *where)
    with pytest.raises(StoreError, match=r"^rpm: must be"):
        run("keys", "create", "ann", "--rpm", "0", *where)
    with pytest.raises(LaunchError, match="not there; is the cluster up"):
        run("keys", "list", "--run-dir", str(run_dir / "other"))
    with pytest.raises(SystemExit):
        run("usage", "--since", "yesterday")
    monkeypatch.setenv("TIDEPOOL_ADMIN_KEY", "tp-admin-wrong")
    with pytest.raises(StoreError, match=r"401: This is no live key\."):
        run("usage", *where)
    monkeypatch.setenv("TIDEPOOL_BASE_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(LaunchError, match="does not answer"):
        run("usage", "--run-dir", "/nowhere")
    monkeypatch.setenv("TIDEPOOL_BASE_URL", "127.0.0.1:8000")
    with pytest.raises(LaunchError, match="must begin with"):
        run("usage", "--run-dir", "/nowhere")
