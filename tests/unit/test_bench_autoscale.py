"""The report of an autoscaling run: its table, its plot, and what happens to gaps and to a file that is not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.__main__ import main
from cluster.errors import ConfigError

PNG = b"\x89PNG\r\n\x1a\n"


def sample(t: float, **changes: int | None) -> dict[str, Any]:
    return {"t": t, "offered": 8, "running": 4, "queued": 4, "replicas": 1, "hosts": 1, **changes}


def run_of(*samples: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "autoscale", "commit": "c0ffee" * 7, "started": "2026-11-24T17:00:00+00:00", "name": "4 hosts",
        "machine": {"cpu": "a processor", "cores": 2, "memory_mib": 24000, "gpus": []},
        "samples": list(samples),
        "marks": [{"t": 0.5, "text": "load"}, {"t": 30.0, "text": "no load"}],
        "steps": [{"name": "ray up", "seconds": 31.44}, {"name": "two replicas", "seconds": 60.0}],
        "requests": [
            {"phase": "load", "answered": 120, "failed": 0, "longest_s": 12.34},
            {"phase": "no load", "answered": 0, "failed": 2, "longest_s": None},
        ],
    }  # fmt: skip


def test_the_table_has_every_step_and_phase_and_the_sums():
    lines = report.markdown(run_of(sample(0.0), sample(0.5, hosts=None, replicas=2), sample(61.0, hosts=2))).splitlines()
    assert "| ray up | 31.4 |" in lines and "| two replicas | 60.0 |" in lines
    assert "| load | 120 | 0 | 12.3 |" in lines and "| no load | 0 | 2 | - |" in lines and "| all | 120 | 2 | |" in lines
    assert "3 samples in 61 s; at most 8 clients, 2 replicas, 2 worker hosts" in lines
    assert "commit `c0ffeec0ffeec0ffeec0` · 4 hosts, a processor, 2 cores, 24000 MiB" in lines


@pytest.mark.parametrize(
    "samples",
    [
        [sample(0.0), sample(0.5, running=None, queued=None, replicas=None, hosts=None), sample(40.0, offered=0, running=0)],
        [sample(0.0, running=None, queued=None, replicas=None, hosts=None)],
        [],
    ],
    ids=["gaps", "unknown", "empty"],
)
def test_the_plot_is_drawn_whatever_is_missing(samples, tmp_path: Path):
    file = tmp_path / "new" / "plot.png"
    report.plot(run_of(*samples), file)
    assert file.read_bytes().startswith(PNG) and file.stat().st_size > 10_000
    assert report.markdown(run_of(*samples))


def test_the_command_prints_the_table_and_writes_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, picture = tmp_path / "autoscale.json", tmp_path / "autoscaling.png"
    file.write_text(json.dumps(run_of(sample(0.0), sample(0.5))))
    assert main(["report", str(file), "--plot", str(picture)]) == 0
    assert "| ray up | 31.4 |" in capsys.readouterr().out and picture.read_bytes().startswith(PNG)


def test_half_a_document_is_refused(tmp_path: Path):
    file = tmp_path / "half.json"
    file.write_text(json.dumps({"kind": "autoscale", "samples": []}))
    with pytest.raises(ConfigError, match="not a result file"):
        report.write(file, Path("-"))
