"""A cluster whose endpoint speaks HTTPS: stock clients verify it, HTTP and old TLS are refused, the key is nowhere to be read."""

from __future__ import annotations

import http.client
import json
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from conftest import ROOT, cluster_command, settings

sys.path.insert(0, str(ROOT / "tests" / "unit"))
import certificates

PORTS = {"port": 18300, "gcs_port": 18301, "dashboard_port": 18302, "stats_port": 18303, "proxy_metrics_port": 18304}
MODEL = {
    "id": "tiny",
    "model_source": "embedded:random",
    "device": "cpu",
    # Nothing here is compiled, and the compiler's import costs seconds.
    "env": {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    },
    "engine_kwargs": {"max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True, "dtype": "float32"},
    "autoscaling": {"min_replicas": 0, "downscale_to_zero_delay_s": 600},
}


@dataclass(frozen=True)
class Served:
    """The cluster: its run directory and endpoint file, what `up` printed, certificate and key."""

    run_dir: Path
    endpoint: dict[str, Any]
    told: str
    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = certificates.make(folder)
    config = folder / "tls.yaml"
    tls = {"certificate": str(certificate), "key": str(key)}
    config.write_text(yaml.safe_dump({"node": {"tls": tls, "min_free_memory_mb": 1024}, "models": [MODEL]}))
    run_dir = Path(tempfile.mkdtemp(prefix="tp"))
    args = [str(config), "--run-dir", str(run_dir), *settings(PORTS, (18310, 18360))]
    up = cluster_command("up", *args)
    try:
        assert up.returncode == 0, f"up failed\n{up.stdout}\n{up.stderr}"
        again = cluster_command("up", *args)
        assert again.returncode == 0 and "already running" in again.stdout, again.stdout + again.stderr
        status = cluster_command("status", *args)
        assert status.returncode == 0, status.stdout + status.stderr
        told = "".join(done.stdout + done.stderr for done in (up, again, status))
        yield Served(run_dir, json.loads((run_dir / "endpoint.json").read_text()), told, certificate, key)
    finally:
        down = cluster_command("down", *args)
        print(down.stdout, down.stderr)
        shutil.rmtree(run_dir, ignore_errors=True)


def test_the_stock_client_verifies_it(served: Served) -> None:
    assert served.endpoint["base_url"] == "https://127.0.0.1:18300/v1"
    with httpx.Client(verify=ssl.create_default_context(cafile=str(served.certificate))) as transport:
        client = openai.OpenAI(base_url=served.endpoint["base_url"], api_key=served.endpoint["api_key"], http_client=transport)
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError):  # the model sleeps: waking it costs as much as all else here
            client.completions.create(model="other", prompt="Hello")
    with httpx.Client() as stranger, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        stranger.get("https://127.0.0.1:18300/healthz")


def test_our_own_clients_verify_it(served: Served) -> None:
    for words in (["keys", "list"], ["usage"]):
        done = cluster_command(*words, "--run-dir", str(served.run_dir))
        assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "bench", "load", "--url", served.endpoint["base_url"], "--key", served.endpoint["api_key"]]
    command += ["--model", "other", "--streams", "1", "--requests", "1", "--certificate", served.endpoint["certificate"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "404" in str(json.loads(done.stdout)["failure_reasons"]), done.stdout + done.stderr


def test_plain_http_is_not_answered(served: Served) -> None:
    plain = http.client.HTTPConnection("127.0.0.1", 18300, timeout=10)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        plain.request("GET", "/healthz")
        plain.getresponse()


@pytest.mark.parametrize(("version", "status"), [("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)])
def test_old_tls_is_refused(served: Served, version: str, status: bool) -> None:
    command = ["openssl", "s_client", "-connect", "127.0.0.1:18300", version, *([] if status else ["-cipher", "ALL:@SECLEVEL=0"])]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20)
    assert (done.returncode == 0) == status, done.stderr
    assert status or "alert protocol version" in done.stderr, done.stderr


def test_the_key_is_nowhere_to_be_read(served: Served) -> None:
    secret = "".join(served.key.read_text().splitlines()[1:2]).encode()
    assert len(secret) > 40 and secret.decode() not in served.told
    files = [file for file in served.run_dir.rglob("*") if file.is_file() and not file.is_symlink()]
    holders = [file for file in files if secret in file.read_bytes()]
    assert {file.name for file in holders} == {"endpoint.pem"}
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in holders)
