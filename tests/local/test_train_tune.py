"""Searches with real Ray Tune: over real training runs, killed on the way; and over a quick stand-in for what a run reports.

The stand-in has the interface of `train.run.train` and writes the index of its checkpoints, so that a population takes seconds.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, load, parse
from cluster.errors import TrainError
from cluster.processes import RUN_DIR, marked
from train import checkpoint
from train.__main__ import main
from train.storage import Storage
from train.trials import Ledger
from train.tune import Outcome, placement_groups, tune

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600
RATE = "optimizer.learning_rate"
# Also idle: what Ray Train and Ray Data keep once per cluster.
IDLE = {"ray::IDLE", "ray::_AutoscalingCoordinatorActor"}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """One cluster for all searches of this module; a folder with a short path."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ["MPLCONFIGDIR"] = str(tmp_path_factory.mktemp("matplotlib"))
    # As in a command's own cluster: at nice 15, Ray's default, workers stand still on a machine that does anything else.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    # A short path: Ray's sockets are below it.
    with tempfile.TemporaryDirectory(prefix="tn-", ignore_cleanup_errors=True) as home:
        try:
            ray.init(num_cpus=3, include_dashboard=False, _temp_dir=home, object_store_memory=100 * 2**20,
                     logging_level="ERROR", log_to_driver=False)  # fmt: skip
            yield home
        finally:
            ray.shutdown()
            for name in ("MPLCONFIGDIR", "RAY_worker_niceness"):
                del os.environ[name]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory) -> Path:
    """Short dialogues: the answer repeats two words of the question."""
    folder = tmp_path_factory.mktemp("dialogues")
    words = ("red", "blue", "green", "one", "two", "three", "cat", "dog", "bird", "north", "south", "east", "west")
    pairs = [(one, other) for one in words for other in words]
    for name, chosen in (("train", pairs[::2]), ("valid", pairs[1::12])):
        rows = [
            {"messages": [{"role": "user", "content": f"say {a} then {b}"}, {"role": "assistant", "content": f"{a} {b} {a}"}]}
            for a, b in chosen
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def configured(home: Path, data: Path, train: dict[str, Any], **search: Any) -> dict[str, Any]:
    base = {
        "name": "s", "base": "scratch:chat", "output": str(home / "out"), "epochs": 9, "batch_size": 4, "precision": "fp32",
        "data": {"train": [str(data / "train.jsonl")], "validation": [str(data / "valid.jsonl")], "max_length": 48},
        "zero": {"stage": 0}, "scale": {"device": "cpu", "threads_per_worker": 1}, "price": {"cpu_hour": 0.04},
    }  # fmt: skip
    space = {RATE: {"low": 1e-6, "high": 1e-2, "log": True}}
    return {"run_dir": str(home / "run"), "train": base | train, "tune": {"space": space, **search}}


def stand_in(config: Any, on_step: Any, stop: Any, step_s: float = 0.02) -> None:
    """Trains nothing: the validation loss is lowest at a learning rate of 0.003. A rate above 0.009 fails."""
    rate = config.optimizer.learning_rate
    if rate > 0.009:
        raise TrainError("the loss of step 1 is nan;\nlower it")
    run = Storage.open(config.output).below(config.name)
    found = checkpoint.latest(run)
    for step in range(found.step + 1 if found else 1, config.max_steps + 1):
        deadline = time.monotonic() + step_s
        while time.monotonic() < deadline:
            if stop():
                raise TrainError("stopped")
            time.sleep(0.005)
        if step % config.checkpoint.every_steps == 0:
            made = checkpoint.Checkpoint(step, step, 1, {"lr": rate})
            run.write_json(f"{checkpoint.FOLDER}/{made.folder}/{checkpoint.INDEX}", dataclasses.asdict(made))
        loss = 1 + abs(math.log10(rate / 0.003)) + 3 / step
        on_step({"step": step, "loss": loss, "validation_loss": loss if step % config.validate_every == 0 else None})


def search(config: Config, runner: Any = stand_in) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    outcome = tune(config, say=said.append, runner=runner)
    assert placement_groups() == []
    return outcome, said


def ray_workers() -> Counter[str]:
    """Actors and tasks of this process's cluster, by their titles."""
    parents = {}
    titles = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            except OSError:
                continue  # it ended meanwhile
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return Counter(titles[pid] for pid in ours & titles.keys() if titles[pid].startswith("ray::"))


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_asha_over_real_runs_is_killed_and_taken_up_and_leaves_nothing(tmp_path, dialogues, home):
    # The file's own learning rate is poor on purpose.
    train = {
        "max_steps": 6, "validate_every": 2, "optimizer": {"learning_rate": 1e-6, "schedule": "constant"},
        "checkpoint": {"every_steps": 2, "keep_last": 1, "keep_best": 0},
    }  # fmt: skip
    data = configured(tmp_path, dialogues, train, trials=8, concurrent=2, grace_steps=2)
    path = tmp_path / "search.yaml"
    path.write_text(json.dumps(data))
    config = load(path)
    assert config.train is not None
    ledger = Ledger.of(config.train)

    # A killed command cannot remove its cluster's files.
    environ = os.environ | {RUN_DIR: str(tmp_path), "TMPDIR": home}
    log = (tmp_path / "log").open("w")
    command = subprocess.Popen([sys.executable, "-m", "train", "tune", str(path)], cwd=ROOT, env=environ, stdout=log, stderr=log)
    wait_for(lambda: command.poll() is not None or sum(trial.ended for trial in ledger.all()) >= 3, "three trials")
    assert command.poll() is None, (tmp_path / "log").read_text()
    command.send_signal(signal.SIGKILL)
    command.wait()
    wait_for(lambda: not marked(tmp_path), "the end of the killed command's processes")

    ended = {trial.number: trial for trial in ledger.all() if trial.ended}
    begun = {trial.number: trial for trial in ledger.all() if not trial.ended}
    books = {number: ledger.runs().read_bytes(f"{trial.run}/run.json") for number, trial in ended.items()}
    assert 3 <= len(ended) < 8

    before = ray_workers()
    outcome, said = search(config, runner=real())
    assert any("taken up" in line for line in said)
    # What had ended was not trained again, what had begun went on under its number and with its values.
    assert {number: ledger.read(number) for number in ended} == ended
    assert {number: ledger.runs().read_bytes(f"{trial.run}/run.json") for number, trial in ended.items()} == books
    for number, trial in begun.items():
        assert ledger.read(number).values == trial.values
    assert len(outcome.trials) == 8 and {trial.state for trial in outcome.trials} <= {"finished", "stopped"}

    # ASHA found a better learning rate than the file's.
    default = outcome.trials[0].best
    assert outcome.trials[0].values == {RATE: 1e-6} and default is not None and outcome.best.best is not None
    assert outcome.best.best.validation_loss < default.validation_loss - 0.5
    assert any(trial.state == "stopped" and trial.step < 6 for trial in outcome.trials)

    # Nothing is left: no placement group (see `search`), no train worker, no trial, no file of Tune's.
    wait_for(lambda: set(ray_workers()) - set(before) <= IDLE, f"only idle processes: {ray_workers()}")
    assert ledger.folder.list() == [
        "best.yaml", "coordinates.png", "curves.png", "data", "report.md", "runs", "search.json", "trials", "trials.jsonl",
    ]  # fmt: skip
    report_is_whole(ledger, 8, said)
    cost = ledger.runs().below(outcome.best.run).read_json("cost.json")
    assert cost["usage"]["cpu_seconds"] > 0 and cost["measured_usd"]["total"] > 0 and cost["plan"]["total_usd"] > 0

    # Once more: nothing is left to do. And the file that it wrote is a training configuration.
    again = tune(config, say=said.append)
    assert again.best == outcome.best and said[-1].startswith("python -m train sft ")
    assert main(["sft", str(tmp_path / "out" / "s-search" / "best.yaml"), "--check"]) == 0


def real() -> Any:
    from train.trial import train_run

    return train_run


def report_is_whole(ledger: Ledger, trials: int, said: list[str]) -> None:
    folder = ledger.folder
    for name in ("curves.png", "coordinates.png"):
        assert folder.read_bytes(name).startswith(b"\x89PNG") and folder.size(name) > 5000
    rows = [json.loads(line) for line in folder.read_bytes("trials.jsonl").splitlines()]
    assert [row["number"] for row in rows] == list(range(trials)) and all(row["spent_unit"] == "usd" for row in rows)
    report = folder.read_bytes("report.md").decode()
    assert report.count("\n| ") == trials + 2 and "best so far" in report and "per dollar" in report
    best = load(str(folder.local("best.yaml")))
    assert best.train is not None and best.train.optimizer.learning_rate > 1e-5
    # After each trial: what was spent, and the best so far.
    assert sum("; spent $0." in line and ", best " in line for line in said) >= 1
    assert any("one more trial" in line or "no trial was better" in line for line in said)


def test_a_stopped_run_of_two_workers_gives_its_placement_group_back(tmp_path, dialogues):
    train = {
        "max_steps": 20, "validate_every": 2, "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "scale": {"device": "cpu", "threads_per_worker": 1, "workers": 2}, "checkpoint": {"every_steps": 20},
    }  # fmt: skip
    data = configured(tmp_path, dialogues, train, trials=2, grace_steps=2, reduction=2)
    # Only the file's own value is a good one: the second trial is stopped on its way.
    data["tune"]["space"] = {RATE: {"low": 1e-6, "high": 1e-5}}
    before = ray_workers()
    found, _ = search(parse(data), runner=real())
    assert [(trial.number, trial.state) for trial in found.trials] == [(0, "finished"), (1, "stopped")]
    assert found.trials[1].step < 20
    wait_for(lambda: set(ray_workers()) - set(before) <= IDLE, f"only idle processes: {ray_workers()}")


def test_a_population_exchanges_weights_and_values(tmp_path, dialogues):
    train = {"max_steps": 40, "optimizer": {"learning_rate": 1e-6}}
    data = configured(tmp_path, dialogues, train, scheduler="pbt", trials=3, concurrent=3, grace_steps=10)
    # Slow steps: trials do not start at the same moment, and only one that is not over yet can be taken over from.
    found, _ = search(parse(data), partial(stand_in, step_s=0.2))
    assert [trial.state for trial in found.trials] == ["finished"] * 3 and all(trial.step == 40 for trial in found.trials)
    # The poor default took over from a better one: its weights, at their step, and its values, changed a little.
    poor = found.trials[0]
    assert poor.generation >= 1 and poor.values[RATE] > 1e-6
    runs = Storage.open(str(tmp_path / "out" / "s-search" / "runs"))
    assert {f"trial-000-{number}" for number in range(1, poor.generation + 1)} <= set(runs.list())
    inherited = checkpoint.stored(runs.below("trial-000-1"))[0]
    assert inherited.model["lr"] not in (1e-6, poor.values[RATE])
    assert all(1e-6 <= trial.values[RATE] <= 1e-2 for trial in found.trials)


def test_a_search_ends_when_nothing_is_gained_and_goes_on_after_a_failure(tmp_path, dialogues):
    train = {"max_steps": 4, "validate_every": 2, "optimizer": {"learning_rate": 0.003}}
    data = configured(tmp_path, dialogues, train, scheduler="none", search="random", trials=30, stop_after=4)
    # The default is the best there is, so no other brings a gain; half of the range fails.
    data["tune"]["space"] = {RATE: {"low": 0.0085, "high": 0.0095}}
    found, said = search(parse(data))
    assert found.reason == "4 trials in a row brought no gain" and 5 <= len(found.trials) < 30
    assert found.best.number == 0
    failed = [trial for trial in found.trials if trial.state == "failed"]
    assert failed and all(trial.error == "the loss of step 1 is nan; lower it" for trial in failed)
    assert any("no trial was better than the first" in line or "one more trial no longer pays" in line for line in said)
    with pytest.raises(TrainError, match=r"holds a search with other values of train\.seed"):
        tune(parse(data | {"train": data["train"] | {"seed": 3}}), say=said.append, runner=stand_in)


def test_a_search_in_which_all_fail_says_why(tmp_path, dialogues):
    train = {"max_steps": 4, "optimizer": {"learning_rate": 0.5}}
    data = configured(tmp_path, dialogues, train, trials=20, scheduler="none")
    data["tune"]["space"] = {RATE: {"low": 0.1, "high": 0.2}}
    with pytest.raises(TrainError, match="no trial has a validation loss; the first error: the loss of step 1 is nan; lower it"):
        tune(parse(data), say=lambda text: None, runner=stand_in)
    assert len(Ledger.of(parse(data).train).all()) < 8  # type: ignore[arg-type]
