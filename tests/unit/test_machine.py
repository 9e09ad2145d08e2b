"""The checks of a machine, with what they look at given: files, folders, a table of routes, a clock that is wrong, a driver."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import machine
from cluster.preflight import free_port, room

ROOT = Path(__file__).resolve().parents[2]
HEADER = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
DEFAULT = "eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
LOCAL = "eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"


def test_shared_memory_that_is_there_missing_and_too_small(tmp_path):
    assert machine.shared_memory(1, tmp_path).level == "ok"
    missing = machine.shared_memory(200, tmp_path / "none")
    assert missing.level == "error" and "is missing" in missing.what and "tmpfs of 200 MiB" in missing.fix
    small = machine.shared_memory(10**9, tmp_path)
    assert small.level == "error" and "node.object_store_mb wants 1000000000" in small.what and "--shm-size" in small.fix


def test_shared_memory_that_is_full_counts_only_before_the_start(tmp_path):
    usage = shutil.disk_usage(tmp_path)
    between = (usage.free + usage.total) // 2 // 2**20
    assert machine.shared_memory(between, tmp_path).level == "warning"
    assert machine.shared_memory(between, tmp_path, running=True).level == "ok"


def test_a_disk_with_room_one_without_and_a_folder_that_cannot_be(tmp_path):
    assert "error" not in [finding.level for finding in machine.disk(tmp_path / "new" / "run", tmp_path)]
    (full,) = room("run_dir", tmp_path / "new", 10**9)
    assert full.level == "error" and str(full).endswith("MiB wanted; make room, or mount a larger disk there")
    (tmp_path / "file").write_text("")
    found = {finding.where: finding for finding in machine.disk(tmp_path / "file" / "run", tmp_path)}
    assert found["run_dir"].level == "error" and "cannot be written" in found["run_dir"].what
    assert len(found) == 2


@pytest.mark.parametrize(("limit", "level"), [(512, "error"), (4096, "warning"), (8192, "ok")])
def test_open_files(limit, level):
    code = "from cluster import machine; print(machine.open_files().level)"
    line = f'ulimit -n {limit} && exec "$0" -c "$1"'
    done = subprocess.run(["sh", "-c", line, sys.executable, code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == level


def test_the_tokens_file(tmp_path):
    token = tmp_path / "auth_token"
    assert machine.token_file(token).level == "error" and "file_mounts" in machine.token_file(token).fix
    token.write_text("\n")
    assert "is empty" in machine.token_file(token).what
    token.write_text("abc")
    token.chmod(0o644)
    assert machine.token_file(token).level == "warning" and machine.token_file(token).fix == f"chmod 600 {token}"
    token.chmod(0o600)
    assert machine.token_file(token).level == "ok"
    assert "abc" not in str(machine.token_file(token))


def test_a_node_without_a_default_route_is_named(tmp_path):
    table = tmp_path / "route"
    table.write_text(HEADER + LOCAL + DEFAULT)
    assert machine.route("127.0.0.1", table)[0].level == "ok"
    table.write_text(HEADER + LOCAL)
    (finding,) = machine.route("127.0.0.1", table)
    assert finding.level == "warning" and "127.0.0.1" in finding.what and finding.fix.startswith("ip route add default")


def test_a_head_whose_name_is_unknown(tmp_path):
    (finding,) = machine.route("no-such-host.invalid", tmp_path / "route")
    assert finding.level == "error" and "no way to no-such-host.invalid" in finding.what


def nvidia_smi(folder: Path, query: str, table: str = "") -> str:
    """A program that answers as NVIDIA's does."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncase \"$1\" in --query*) printf '{query}';; *) echo '{table}';; esac\n")
    program.chmod(0o700)
    return str(program)


def test_a_gpu_that_is_wanted_and_not_there(tmp_path):
    silent = nvidia_smi(tmp_path, "No devices were found\\n")
    finding = machine.gpu(True, nvidia_smi=silent)
    assert finding.level == "error" and "device: cpu" in finding.fix
    assert machine.gpu(True, "warning", silent).level == "warning"
    assert machine.gpu(False, nvidia_smi=silent).level == "ok"
    assert machine.gpu(True, nvidia_smi=str(tmp_path / "none")).level == "error"


def test_gpus_are_counted_and_shown(tmp_path):
    program = nvidia_smi(tmp_path, "NVIDIA L4, 580.65, 23034 MiB\\nNVIDIA L4, 580.65, 23034 MiB\\n", "CUDA Version: 13.0")
    assert machine.gpu(False, nvidia_smi=program).what.startswith("2 x NVIDIA L4, driver 580.65")


@pytest.mark.parametrize(
    ("wanted", "built", "driver", "level", "text"),
    [
        (True, None, (13, 0), "error", "torch is built for CPU"),
        (False, None, (13, 0), "ok", "no GPU wanted"),
        (True, (13, 0), (12, 8), "error", "install a driver for CUDA 13 or newer"),
        (False, (13, 0), (12, 8), "warning", "knows CUDA 12.8"),
        (True, (12, 8), (12, 4), "ok", "torch for CUDA 12.8"),
        (True, (13, 0), (13, 1), "ok", "torch for CUDA 13.0"),
        (True, (13, 0), None, "ok", "torch for CUDA 13.0"),
    ],
)
def test_the_driver_and_the_release_torch_is_built_for(wanted, built, driver, level, text):
    finding = machine.driver_fits("1 x NVIDIA L4, driver 1", wanted, built, driver)
    assert finding.level == level and text in str(finding)


def test_what_nvidia_smi_says_of_cuda():
    assert machine.driver_cuda("| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0 |") == (13, 0)
    assert machine.driver_cuda("| CUDA UMD Version: 13.2 |") == (13, 2)
    assert machine.driver_cuda("| CUDA Version: N/A |") is None


@contextmanager
def server(ahead_s: float, status: int = 200) -> Iterator[int]:
    """An HTTP server with its clock `ahead_s` seconds off; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(int(time.time() + ahead_s))

        def log_message(self, *_: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running.server_port
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [200, 401, 404])
def test_the_clock_is_compared_with_any_answer(status):
    with server(-100.0, status) as port:
        offset = machine.clock_offset("127.0.0.1", port)
    assert offset is not None and abs(offset - 100.0) < 1.5


def test_who_does_not_answer_has_no_clock():
    assert machine.clock_offset("127.0.0.1", free_port()) is None


def test_how_far_a_clock_may_be():
    assert [machine.clock(offset).level for offset in (None, 0.4, -1.9, 5.0, -31.0)] == ["ok", "ok", "ok", "warning", "error"]
    assert machine.clock(-31.0).what == "31.0 s behind the head" and "NTP" in machine.clock(-31.0).fix
    assert machine.clock(5.0).what == "5.0 s ahead of the head"


def test_nothing_here_waits_for_a_proxy_of_the_environment():
    environ = {**os.environ, "http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": ""}
    with server(0.0) as port:
        code = f"from cluster import machine; print(machine.clock_offset('127.0.0.1', {port}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert abs(float(done.stdout)) < 1.5
