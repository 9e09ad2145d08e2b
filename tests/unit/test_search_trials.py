"""The ledger of a search, one trial in one process, and the values that trials get, all without Ray."""

import dataclasses
import json
import math
import threading
from typing import Any

import pytest
import yaml

from cluster.config import parse
from cluster.errors import TrainError
from cluster.train_config import TrainConfig, TuneConfig
from train import checkpoint, search_report, suggest, tune
from train.suggest import Suggestions
from train.trial import Attempt, copy_checkpoint, run_config
from train.trials import Ledger, Report, Trial, gainless

RATE = "optimizer.learning_rate"


def configs(tmp_path, **search: Any) -> tuple[TrainConfig, TuneConfig, Ledger]:
    config = parse({
        "train": {"name": "s", "base": "scratch:chat", "output": str(tmp_path), "precision": "fp32", "max_steps": 9,
                  "data": {"train": ["a"], "validation": ["b"]}, "scale": {"device": "cpu"}, "price": {"cpu_hour": 3.6}},
        "tune": {"space": {RATE: {"low": 1e-5, "high": 1e-1, "log": True}}, "grace_steps": 3} | search,
    })  # fmt: skip
    assert config.train is not None and config.tune is not None
    return config.train, config.tune, Ledger.of(config.train)


def report(step: int, loss: float, seconds: float = 1.0) -> Report:
    return Report(step, loss, loss, seconds)


def test_a_trial_is_read_as_it_was_written(tmp_path):
    _, _, ledger = configs(tmp_path)
    trial = Trial(12, {RATE: 0.1, "data.train": ["a"]}, "failed", 2, 3.5, (report(1, 2.0), report(2, math.inf)), "no")
    ledger.write(trial)
    assert ledger.read(12) == trial and ledger.all() == [trial]
    # A trial that has ended stays as it is.
    assert ledger.end(12, "stopped") == trial
    ledger.write(Trial(3, {}))
    assert ledger.end(3, "stopped").state == "stopped" and [one.number for one in ledger.all()] == [3, 12]


def test_a_folder_holds_one_search(tmp_path):
    train, search, ledger = configs(tmp_path)
    ledger.begin(train, search)
    more = search.model_copy(update={"trials": 99, "concurrent": 4, "stop_after": 5})
    ledger.begin(train, more)
    with pytest.raises(
        TrainError, match=r"holds a search with other values of train\.seed, tune\.grace_steps; change train\.name"
    ):
        ledger.begin(train.model_copy(update={"seed": 5}), search.model_copy(update={"grace_steps": 4}))


def test_gainless_counts_from_the_best():
    def trials(*losses: float | None) -> list[Trial]:
        return [Trial(number, {}, reports=() if loss is None else (report(1, loss),)) for number, loss in enumerate(losses)]

    assert [gainless(trials(*losses)) for losses in ([3.0], [3.0, 2.0], [2.0, 3.0, None], [None, None])] == [0, 0, 2, 2]


def test_an_attempt_reports_each_validation_loss_once_and_ends(tmp_path):
    train, search, ledger = configs(tmp_path)
    ledger.write(Trial(0, {RATE: 0.01}))
    seen: list[TrainConfig] = []

    def runner(config: TrainConfig, on_step: Any, stop: Any) -> None:
        seen.append(config)
        for step in range(1, 7):
            on_step({"step": step, "loss": 9.0})
            if step % config.validate_every == 0:
                on_step({"step": step, "loss": 9.0, "validation_loss": 10.0 - step})

    attempt = Attempt(ledger, 0, train, search, runner)
    results = [attempt.next() for _ in range(3)]
    assert [(made["step"], made["validation_loss"], made.get("done")) for made in results] == [
        (3, 7.0, None), (6, 4.0, None), (6, 4.0, True),
    ]  # fmt: skip
    trial = ledger.read(0)
    assert (trial.state, trial.step, trial.best) == ("finished", 6, trial.reports[1]) and trial.seconds > 0
    # The run is named after the trial, has its value, shows its loss when the scheduler looks, and shares the data.
    (config,) = seen
    assert (config.name, config.optimizer.learning_rate, config.validate_every) == ("trial-000", 0.01, 3)
    assert config.output == f"{tmp_path}/s-search/runs" and config.data.prepared == f"{tmp_path}/s-search"
    # Told again, it trains nothing.
    again = Attempt(ledger, 0, train, search, runner)
    assert [again.next() for _ in range(3)] == results and len(seen) == 1


def test_an_open_trial_goes_on_where_it_was(tmp_path):
    train, search, ledger = configs(tmp_path)
    ledger.write(Trial(0, {RATE: 0.01}, reports=(report(3, 7.0, 20.0),), seconds=20.0))

    def runner(config: TrainConfig, on_step: Any, stop: Any) -> None:
        # Its checkpoint is older than its last report: step 3 comes again.
        for step in (2, 3, 4, 5, 6):
            on_step({"step": step, "loss": 1.0, "validation_loss": 10.0 - step if step % 3 == 0 else None})

    attempt = Attempt(ledger, 0, train, search, runner)
    assert [attempt.next()["step"] for _ in range(3)] == [3, 6, 6]
    assert [one.step for one in ledger.read(0).reports] == [3, 6] and ledger.read(0).seconds > 20


def test_losses_that_a_killed_command_has_not_seen_are_read_from_the_run(tmp_path):
    train, search, ledger = configs(tmp_path)
    ledger.write(Trial(0, {RATE: 0.01}, reports=(report(3, 7.0, 20.0),)))
    lines = [{"step": step, "loss": 1.0} | ({"validation_loss": 10.0 - step} if step % 3 == 0 else {}) for step in range(1, 10)]
    ledger.runs().write_bytes("trial-000/log/metrics.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
    attempt = Attempt(ledger, 0, train, search, lambda config, on_step, stop: None)
    assert attempt.next()["step"] == 3
    assert attempt.next() == {"number": 0, "step": 9, "validation_loss": 1.0, "done": True}
    assert [one.step for one in ledger.read(0).reports] == [3, 6, 9]


def test_an_attempt_stops_its_run_before_it_answers(tmp_path):
    train, search, ledger = configs(tmp_path)
    ledger.write(Trial(0, {RATE: 0.01}))
    ended = threading.Event()

    def runner(config: TrainConfig, on_step: Any, stop: Any) -> None:
        on_step({"step": 3, "loss": 1.0, "validation_loss": 1.0})
        while not stop():
            ended.wait(0.01)
        ended.set()
        raise TrainError("stopped")

    attempt = Attempt(ledger, 0, train, search, runner)
    assert attempt.next()["step"] == 3
    assert attempt.stop() and ended.is_set()
    # Why it ended is for the one who stopped it to say.
    assert ledger.read(0).state == "running"


def test_a_failed_run_is_a_failed_trial_and_a_lost_one_is_tried_again(tmp_path):
    train, search, ledger = configs(tmp_path)
    ledger.write(Trial(0, {RATE: 0.01}))
    errors = [RuntimeError("the node is gone"), TrainError("out of memory;\n lower it")]

    def runner(config: TrainConfig, on_step: Any, stop: Any) -> None:
        raise errors.pop(0)

    attempt = Attempt(ledger, 0, train, search, runner)
    with pytest.raises(RuntimeError, match="gone"):
        attempt.next()
    assert not ledger.read(0).ended
    assert attempt.next() == {"number": 0, "validation_loss": math.inf, "step": 0, "done": True}
    assert (ledger.read(0).state, ledger.read(0).error) == ("failed", "out of memory; lower it")


def test_a_member_takes_over_weights_and_values(tmp_path):
    train, search, ledger = configs(tmp_path, scheduler="pbt")
    for number in (0, 1):
        ledger.write(Trial(number, {RATE: 0.01 * (number + 1)}, reports=(report(6, 5.0),)))
    donor = ledger.runs().below("trial-001")
    for step in (3, 6, 9):
        made = checkpoint.Checkpoint(step, step, 1, {}, files=("a",))
        donor.write_bytes(f"checkpoints/{made.folder}/a", b"weights %d" % step)
        donor.write_json(f"checkpoints/{made.folder}/index.json", dataclasses.asdict(made))

    def runner(config: TrainConfig, on_step: Any, stop: Any) -> None:
        on_step({"step": 6, "loss": 1.0, "validation_loss": 9.0})
        checkpoint_of = ledger.runs().below(config.name)
        made = checkpoint.Checkpoint(8, 8, 1, {})
        checkpoint_of.write_json(f"checkpoints/{made.folder}/index.json", dataclasses.asdict(made))
        on_step({"step": 8, "loss": 1.0, "validation_loss": 6.0})

    attempt = Attempt(ledger, 0, train, search, runner)
    attempt.take_over(Attempt(ledger, 1, train, search, runner).passport(), {RATE: 0.024})
    assert ledger.runs().read_bytes("trial-000-1/checkpoints/step-00000006/a") == b"weights 6"
    # Step 6 is the donor's; what it found before with other values is no result of these.
    assert attempt.next()["step"] == 8
    trial = ledger.read(0)
    assert (trial.generation, trial.values, trial.run) == (1, {RATE: 0.024}, "trial-000-1")
    assert trial.best is not None and (trial.best.step, trial.best.validation_loss, len(trial.reports)) == (8, 6.0, 2)
    assert run_config(train, search, ledger, trial).checkpoint.every_steps == 3
    assert copy_checkpoint(ledger.runs().below("nobody"), donor, 3) == 0
    # From one that has done all its steps there is nothing to take over.
    other = Attempt(ledger, 1, train, search, runner)
    other.take_over({"number": 0, "run": "trial-001", "step": 9}, {RATE: 0.03})
    assert other.trial.generation == 0 and ledger.runs().list() == ["trial-000-1", "trial-001"]


def numbers(suggestions: Suggestions, count: int) -> list[float]:
    made = []
    for _ in range(count):
        drawn = suggestions.next()
        assert drawn is not None
        made.append(drawn[1][RATE])
    return made


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_values_come_from_the_ledger_first(tmp_path, kind):
    train, search, ledger = configs(tmp_path, search=kind, trials=6)
    first = numbers(Suggestions(train, search, ledger), 4)
    assert first[0] == 1e-4 and all(1e-5 <= value <= 1e-1 for value in first) and len(set(first)) == 4
    ledger.write(dataclasses.replace(ledger.read(1), state="finished", reports=(report(9, 1.0),)))
    resumed = Suggestions(train, search, ledger)
    again = numbers(resumed, 6)
    assert again[:4] == first and len(set(again)) == 6
    assert resumed.next() is None and len(ledger.all()) == 6


def test_tpe_looks_where_it_was_good(tmp_path):
    train, search, ledger = configs(tmp_path, trials=30)
    suggestions = Suggestions(train, search, ledger)
    rates = []
    while (drawn := suggestions.next()) is not None:
        number, values = drawn
        rates.append(values[RATE])
        loss = abs(math.log10(values[RATE]) + 2.5)
        suggestions.tell(ledger.write(Trial(number, values, "finished", reports=(report(9, loss),))))
    distances = [abs(math.log10(rate) + 2.5) for rate in rates]
    assert sum(distances[15:]) / 15 < sum(distances[:10]) / 10, rates


def test_a_population_keeps_its_members(tmp_path):
    train, search, ledger = configs(tmp_path, scheduler="pbt", trials=4)
    members = suggest.population(train, search, ledger)
    assert members[0] == {RATE: 1e-4} and len({member[RATE] for member in members}) == 4
    ledger.write(dataclasses.replace(ledger.read(2), values={RATE: 0.05}, generation=1))
    assert suggest.population(train, search, ledger) == [*members[:2], {RATE: 0.05}, members[3]]


def test_a_search_ends_when_it_has_a_reason(tmp_path):
    train, search, ledger = configs(tmp_path, trials=9, stop_after=2)
    said: list[str] = []
    watch = tune.Watch(ledger, train, search, said.append)
    for number, loss in enumerate((5.0, 4.0, 4.5)):
        ledger.write(Trial(number, {RATE: 0.01}, reports=(report(3, loss),), seconds=10.0))
        watch.end(number)
        watch.end(number)
        assert watch.reason is None
    ledger.write(Trial(3, {RATE: 0.01}))
    watch.end(3, "its node\nwas lost")
    assert watch.reason == "2 trials in a row brought no gain" and len(said) == 5
    # 10 s of one CPU at $3.60 an hour are a cent.
    assert (
        "trial 1 stopped at step 3: learning_rate=0.01: validation loss 4.0000; spent $0.020000, best 4.0000, 1.0000 gained"
        in said
    )
    assert said[-1] == "search s ends: 2 trials in a row brought no gain"
    assert tune.Watch(ledger, train, search, said.append).reason == watch.reason


def test_paths_are_made_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    train, _, _ = configs("out")
    moved = train.model_copy(
        update={"base": "base", "data": train.data.model_copy(update={"train": ("a", "s3://b/c", "dataset:d/e")})}
    )
    made = tune.absolute(moved)
    assert (made.output, made.base) == (f"{tmp_path}/out", f"{tmp_path}/base")
    assert made.data.train == (f"{tmp_path}/a", "s3://b/c", "dataset:d/e") and made.data.prepared is None
    assert tune.absolute(train).base == "scratch:chat"


def test_the_report_says_what_was_found_and_paid(tmp_path):
    train, search, ledger = configs(tmp_path, trials=6)
    for number, loss in enumerate((5.0, 4.0, 2.0, 2.5, 2.4)):
        ledger.write(Trial(number, {RATE: 10.0 ** -(number + 1)}, "finished", 0, 10.0, (report(3, 9.0), report(9, loss))))
    ledger.write(Trial(5, {RATE: 0.9}, "failed", error="the loss | is nan"))
    said = search_report.write(ledger, train, search)
    assert said[0].startswith(
        "best of 6 trials: 2 with learning_rate=0.001, validation loss 2.0000 at step 9; the file's own values"
    )
    assert said[1].startswith("one more trial no longer pays: the last 3 gained 0 per dollar, the search 75 on average")
    page = ledger.folder.read_bytes("report.md").decode()
    assert (
        "| 2 | 0.001 | 2.0000 | 9 | 9 | finished | 10.0 | $0.030000 | 2.0000 |" in page and "failed: the loss \\| is nan" in page
    )
    best = parse(yaml.safe_load(ledger.folder.read_bytes("best.yaml"))).train
    assert best is not None and best.optimizer.learning_rate == 0.001 and best.name == "s-best" and best.data == train.data
    assert len(ledger.folder.read_bytes("trials.jsonl").splitlines()) == 6
    assert ledger.folder.read_bytes("curves.png")[:4] == ledger.folder.read_bytes("coordinates.png")[:4] == b"\x89PNG"
    # Without prices, what is counted is time.
    free = train.model_copy(update={"price": train.price.model_copy(update={"cpu_hour": 0.0})})
    assert "0.0028 CPU-hours" in search_report.markdown(ledger.all(), free, search)
