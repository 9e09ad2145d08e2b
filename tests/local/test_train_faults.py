"""Runs in a cluster that outlives their command: killed workers, nodes and commands, other numbers of workers, losses that are no
number. One cluster for all; each run ends with the losses of a run that nothing happened to.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from train_cluster import WORKER, Cluster, book, command, done, metrics, newest_step, until, write_config
from train_workers import section, write_dialogues

pytestmark = pytest.mark.training

STEPS = 300


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Short: Ray's sockets have little room for a path.
    path = Path(tempfile.mkdtemp(prefix="tf"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(folder) -> Iterator[Cluster]:
    made = Cluster(folder / "run")
    try:
        made.start()
        yield made
    finally:
        made.stop()


def config(folder: Path, cluster: Cluster, name: str, **changes: Any) -> Path:
    rows = folder / "chats.jsonl"
    if not rows.exists():
        write_dialogues(rows, 400)
    train = section(
        name,
        folder / "out",
        str(rows),
        data={"max_length": 128},
        batch_size=8,
        max_steps=STEPS,
        checkpoint={"every_steps": 10, "keep_last": 2},
        scale={"workers": [1, 2], "resize_every_s": 3},
    )
    for key, value in changes.items():
        train[key] = {**train[key], **value} if isinstance(train.get(key), dict) else value
    return write_config(folder / f"{name}.json", cluster.session.run_dir, train, cluster.node)


def sizes(home: Path) -> list[int]:
    return [attempt["workers"] for attempt in book(home).get("attempts", [])]


def test_a_run_survives_its_worker_its_node_and_its_command(folder, cluster):
    quiet = folder / "out" / "quiet"
    file = config(folder, cluster, "quiet", scale={"workers": 1})
    status, printed, text = done(command("sft", str(file)))
    assert status == 0, text
    assert f"quiet: {STEPS} steps" in printed

    raylet = cluster.join()
    home = folder / "out" / "storm"
    file = config(folder, cluster, "storm")
    first = command("sft", str(file))
    until("two workers and a checkpoint", lambda: sizes(home) == [2] and newest_step(home) >= 10, process=first)
    cluster.kill(min(cluster.pids(WORKER)))
    until(
        "a second start after the killed worker", lambda: len(sizes(home)) == 2 and metrics(home)[-1]["step"] >= newest_step(home)
    )
    first.kill()  # the command; nobody restarts it while the node goes
    first.communicate()
    cluster.kill(raylet)
    until("one worker after the killed node", lambda: sizes(home)[-1] == 1)
    cluster.join()
    status, printed, text = done(command("sft", str(file)))
    assert status == 0, text
    assert f"storm: {STEPS} steps" in printed

    assert [size for number, size in enumerate(sizes(home)) if number == 0 or sizes(home)[number - 1] != size] == [2, 1, 2]
    lines, straight = metrics(home), metrics(quiet)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in straight], rel=2e-3)
    assert {line["workers"] for line in lines} == {1, 2}
    for attempt, before in zip(book(home)["attempts"][1:], book(home)["attempts"], strict=False):
        assert attempt["from_step"] >= before["from_step"] and attempt["from_step"] % 10 == 0
    until("no worker is left", lambda: not cluster.pids(WORKER))


def test_a_loss_that_is_no_number_ends_with_its_name_and_the_last_good_checkpoint(folder, cluster):
    file = config(folder, cluster, "wild", scale={"workers": 1}, max_steps=8, checkpoint={"every_steps": 1, "keep_last": 9})
    wild = json.loads(file.read_text())
    wild["train"]["optimizer"] |= {"learning_rate": 1e30, "clip": 0, "warmup": 0}
    file.write_text(json.dumps(wild))
    status, _, text = done(command("sft", str(file)))
    assert status == 2
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "wild" in errors[0] and "lower train.optimizer.learning_rate" in errors[0]
    home = folder / "out" / "wild"
    assert book(home)["state"] == "failed" and len(sizes(home)) == 1
    assert "Traceback" not in text


def test_what_cannot_be_written_is_one_line(folder, cluster):
    (folder / "a-file").write_text("in the way")
    file = config(folder, cluster, "nowhere", output=str(folder / "a-file" / "below"))
    status, _, text = done(command("sft", str(file)))
    assert status == 2 and "Traceback" not in text
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and str(folder / "a-file") in errors[0]
