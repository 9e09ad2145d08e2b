"""The screen of `python -m cluster status`: what is said of a full cluster, of an empty one, and of one that answers nothing."""

from __future__ import annotations

import pytest

from cluster.observe import Application, Gpus, Job, Model, Node, Observation
from cluster.screen import lasting, lines, table

NOTHING = Observation(at=0.0, run_dir="/r", processes=0)
SILENT = Observation(at=0.0, run_dir="/r", processes=9, readiness="no answer", models=(Model(Application("chat")),))
FULL = Observation(
    at=0.0,
    run_dir="/work/run",
    processes=41,
    ready=True,
    readiness='{"ready": true}',
    endpoint="http://10.0.0.1:8000/v1",
    keys="/work/run/endpoint.json",
    nodes=(
        Node("10.0.0.1", "head", True, 16, 0, 90061.0, 0.4),
        Node("ip-10-0-0-2.a-region.compute.internal.with.a.very.long.name.indeed", "gpu-h100", False, 96, 8, 61.0, 55.04),
        Node("10.0.0.3", "exotic", False, 8, 0.5, None, None),
    ),
    gone=2,
    starting=(("gpu-l4", 3),),
    gpus=Gpus(8.5, 4, 2, 0),
    gateway=Application("gateway", "running", 2, 2),
    models=(
        Model(Application("org/a-model", "running", 1, 2), 12, 3, 1234.5, 0.876),
        Model(Application("sleeper", "asleep", 0, 0), 0, 0, 0.0, None),
        Model(Application("embedder", "running", 1, 1), 0, 0, None, None, generates=False),
        Model(Application("broken", "deploy failed", 0, 1, "ValueError: no such file"), None, None, None, None),
    ),
    jobs=(Job("first", "training", "running", None, 120, 456.7), Job("nightly", "job", "failed", 3700.0)),
    usd_per_hour=1055.44,
    unpriced=("exotic",),
)  # fmt: skip


def test_nothing_runs():
    shown = lines(NOTHING)
    assert shown[0] == "run directory  /r" and shown[1].startswith("processes      0") and len(shown) == 2


def test_nobody_answers():
    shown = lines(SILENT)
    assert shown[2] == "ready          no  no answer"
    assert {"NODES  ?", "GPUS  ?", "JOBS  ?"} <= set(shown)
    assert row("\n".join(shown), "chat") == ["chat", "?", "?/?", "?", "?", "?", "?"] and shown[3] == "cost           -"


def test_a_full_screen():
    shown = lines(FULL, 100)
    text = "\n".join(shown)
    assert shown[2] == "ready          yes"
    assert shown[3] == "endpoint       http://10.0.0.1:8000/v1  (keys: /work/run/endpoint.json)"
    assert shown[4] == "cost           $1,055.44 per hour  (without exotic: no price known)"
    assert row(text, "10.0.0.1") == ["10.0.0.1", "head", "head", "16", "0", "1", "d", "1", "h", "0.40"]
    assert row(text, "10.0.0.3") == ["10.0.0.3", "exotic", "worker", "8", "0.5", "?", "-"]
    assert "(3 on the way)" in text and "(2 gone)" in text
    assert "GPUS  8.5: 4 serving, 2 training, 2.5 idle" in shown
    assert row(text, "org/a-model") == ["org/a-model", "running", "1/2", "12", "3", "1,234", "88%"]
    assert row(text, "sleeper") == ["sleeper", "asleep", "0/0", "0", "0", "0", "-"]
    assert row(text, "embedder") == ["embedder", "running", "1/1", "0", "0", "-", "-"]
    assert row(text, "broken")[3:] == ["0/1", "?", "?", "?", "-"] and "  broken: ValueError: no such file" in shown
    assert row(text, "gateway") == ["gateway", "running", "2/2", "-", "-", "-", "-"]
    assert row(text, "first") == ["first", "training", "running", "-", "120", "457"]
    assert row(text, "nightly") == ["nightly", "job", "failed", "1", "h", "01", "min", "-", "-"]


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
    return line.split()


@pytest.mark.parametrize("width", [1, 40, 60, 80, 100, 300])
@pytest.mark.parametrize("seen", [NOTHING, SILENT, FULL])
def test_every_line_fits(seen, width):
    assert max(map(len, lines(seen, width))) <= max(width, 40)


def test_gpus_are_drawn_while_they_are_few_and_whole():
    held = Observation(0.0, "/r", 1, gpus=Gpus(8, 4, 2, 1))
    assert "GPUS  8: 4 serving, 2 training, 1 other, 1 idle  [sssstto.]" in lines(held)
    assert "GPUS  none" in lines(Observation(0.0, "/r", 1, gpus=Gpus(0, 0, 0, 0)))
    assert "GPUS  64: 0 serving, 0 training, 64 idle" in lines(Observation(0.0, "/r", 1, gpus=Gpus(64, 0, 0, 0)))


def test_columns():
    assert table(("NAME", ">N"), [("a", "1"), ("bb", "22")], 80) == ["NAME       N", "a          1", "bb        22"]
    assert table(("NAME", ">N"), [("a-very-long-name", "1")], 12) == ["NAME       N", "a-very-l…  1"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "?"), (-1, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (3660, "1 h 01 min"), (90000, "1 d 1 h")],
)
def test_lengths_of_time(seconds, said):
    assert lasting(seconds) == said
