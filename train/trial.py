"""One trial: a whole training run whose validation losses go to the ledger and to Ray Tune's scheduler.

`Attempt` is the trial in one process: it tells again what the ledger has, then trains (`train.run.train`, in a thread) and hands
on one validation loss at a time; told to stop, it ends the training and its workers before it returns, so that nothing is left.
`trainable` wraps it for Ray Tune, in an actor that asks for no CPU: the workers of the run are what takes resources.
It does not choose values (`train.suggest`) and does not decide who is stopped (Tune's scheduler). Called by `train.tune`.
"""

from __future__ import annotations

import json
import math
import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from cluster.errors import DataError, TidepoolError
from cluster.train_config import TrainConfig, TuneConfig
from train import checkpoint, search_space
from train.storage import Storage
from train.suggest import METRIC, NUMBER, TIME
from train.trials import Ledger, Report, Trial

LOOK_S = 0.2  # how often the end of the training is looked for
METRICS = "log/metrics.jsonl"
STOP_S = 60.0  # longest wait for a run that was told to stop; after it Ray ends its actors
CHECKPOINT_S = 120.0  # longest wait for a checkpoint that others are to take over

OnStep = Callable[[Mapping[str, Any]], None]
Stop = Callable[[], bool]
Runner = Callable[[TrainConfig, OnStep, Stop], Any]


def train_run(config: TrainConfig, on_step: OnStep, stop: Stop) -> Any:
    """The runner of every real search."""
    from train.run import train

    # Trials run side by side; what they say in words is in their folders.
    return train(config, say=lambda text: None, on_step=on_step, stop=stop)


def run_config(train: TrainConfig, tune: TuneConfig, ledger: Ledger, trial: Trial) -> TrainConfig:
    """The configuration of a trial's run.

    Raises:
        ConfigError: the schema refuses the values.
    """
    changed = search_space.apply(train, trial.values)
    # The trials share their sequences: a key of everything that decides them keeps different ones apart.
    data = changed.data.model_copy(update={"prepared": changed.data.prepared or ledger.folder.uri})
    update: dict[str, Any] = {"name": trial.run, "output": ledger.runs().uri, "data": data}
    if tune.scheduler != "none":
        # A scheduler that may stop a trial after `grace_steps` has to see it then.
        update["validate_every"] = min(changed.validate_every, tune.grace_steps)
    if tune.scheduler == "pbt":
        update["checkpoint"] = changed.checkpoint.model_copy(update={"every_steps": update["validate_every"]})
    return changed.model_copy(update=update)


class Attempt:
    """A trial in this process, from the ledger's state on.

    Args:
        ledger: Of the search.
        number: Of the trial, which the ledger has.
        train: The configuration before the trial's values.
        tune: The search.
        runner: What trains.
    """

    def __init__(self, ledger: Ledger, number: int, train: TrainConfig, tune: TuneConfig, runner: Runner) -> None:
        self.ledger, self.train, self.tune, self.runner = ledger, train, tune, runner
        self.trial = ledger.read(number)
        self.told = list(self.trial.reports)
        self.seen = self.trial.step
        self.stopping = False
        self.queue: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.future: Future[Any] | None = None
        self.base, self.begun = self.trial.seconds, 0.0

    def take_over(self, donor: Mapping[str, Any], values: search_space.Values) -> None:
        """Go on from another trial's checkpoint with other values (a population's exchange).

        Where the other one has meanwhile done all its steps there is nothing to go on with, and this trial keeps what it has.

        Args:
            donor: `passport` of the other trial.
            values: The new ones.
        """
        assert self.future is None
        fresh = replace(self.trial, values=values, generation=self.trial.generation + 1)
        own = self.ledger.runs().below(fresh.run)
        step = copy_checkpoint(self.ledger.runs().below(str(donor["run"])), own, int(donor[TIME]))
        if self.train.max_steps is not None and step >= self.train.max_steps:
            own.delete()
            return
        self.trial, self.told, self.seen = self.ledger.write(fresh), [], step

    def passport(self) -> dict[str, Any]:
        """What another trial needs to take over from this one."""
        return {NUMBER: self.trial.number, "run": self.trial.run, TIME: self.trial.step}

    def next(self) -> dict[str, Any]:
        """The next validation loss, or the end with `done`; blocks until there is one.

        Raises:
            RayError: Ray lost the run; it can be tried again.
        """
        if self.told:
            return self._result(self.told.pop(0))
        if self.trial.ended:
            return self._end()
        if self.future is None:
            self._start()
        assert self.future is not None
        while True:
            try:
                report = self.queue.get(timeout=LOOK_S)
            except queue.Empty:
                if self.future.done() and self.queue.empty():
                    return self._done(self.future)
                continue
            self.trial = self.ledger.write(replace(self.trial, reports=(*self.trial.reports, report), seconds=report.seconds))
            if self.tune.scheduler == "pbt":
                self._await_checkpoint(report.step)
            return self._result(report)

    def stop(self) -> bool:
        """End the training, if it runs, and its workers. Returns whether it has ended."""
        if self.future is None:
            return True
        self.stopping = True
        return bool(wait([self.future], timeout=STOP_S).done)

    def _start(self) -> None:
        config = run_config(self.train, self.tune, self.ledger, self.trial)
        self.begun = time.monotonic()
        pool = ThreadPoolExecutor(1, thread_name_prefix="trial")
        self.future = pool.submit(self.runner, config, self._on_step, lambda: self.stopping)
        pool.shutdown(wait=False)

    def _seconds(self) -> float:
        """Spent on the trial so far, by all attempts."""
        return self.base + (time.monotonic() - self.begun if self.begun else 0.0)

    def _on_step(self, metrics: Mapping[str, Any]) -> None:
        """Called by the run at each step, in its own thread."""
        loss, step = metrics.get("validation_loss"), int(metrics["step"])
        # A resumed run repeats the steps since its last checkpoint.
        if loss is not None and step > self.seen:
            self.seen = step
            train_loss = metrics.get("loss")
            last = None if train_loss is None else _plain(train_loss)
            self.queue.put(Report(step, _plain(loss), last, self._seconds(), self.trial.generation))

    def _done(self, future: Future[Any]) -> dict[str, Any]:
        error = future.exception()
        if error is None:
            done = replace(self.trial, state="finished", seconds=self._seconds())
            self.trial = self.ledger.write(replace(done, reports=self._all_reports()))
        elif isinstance(error, TidepoolError):
            text = " ".join(str(error).split())
            self.trial = self.ledger.write(replace(self.trial, state="failed", seconds=self._seconds(), error=text))
        else:
            self.future = None
            raise error
        return self._end()

    def _all_reports(self) -> tuple[Report, ...]:
        """The trial's reports, with those of its run's log that a killed command has not seen."""
        trial, run = self.trial, self.ledger.runs().below(self.trial.run)
        if not run.exists(METRICS):
            return trial.reports
        known = {report.step for report in trial.reports if report.generation == trial.generation}
        lines = [json.loads(line) for line in run.read_bytes(METRICS).splitlines()]
        missed = [
            Report(line["step"], _plain(line["validation_loss"]), _plain(line["loss"]), self._seconds(), trial.generation)
            for line in lines
            if line.get("validation_loss") is not None and line["step"] not in known
        ]
        return tuple(sorted((*trial.reports, *missed), key=lambda report: (report.generation, report.step)))

    def _await_checkpoint(self, step: int) -> None:
        """Until others can take over from this step: the loss is reported before the checkpoint is whole."""
        run, limit = self.ledger.runs().below(self.trial.run), time.monotonic() + CHECKPOINT_S
        while time.monotonic() < limit and self.future is not None and not self.future.done():
            newest = checkpoint.latest(run)
            if newest is not None and newest.step >= step:
                return
            time.sleep(LOOK_S)

    def _result(self, report: Report) -> dict[str, Any]:
        made = {NUMBER: self.trial.number, METRIC: report.validation_loss, TIME: report.step}
        if self.tune.scheduler == "pbt" and self.train.max_steps is not None and report.step >= self.train.max_steps:
            # Without its step the scheduler exchanges nothing: there is nothing left to train.
            del made[TIME]
        return made

    def _end(self) -> dict[str, Any]:
        last = self.trial.reports[-1] if self.trial.reports else Report(0, math.inf, None, 0.0)
        made = {**self._result(last), "done": True}
        if self.tune.scheduler == "pbt":
            made.pop(TIME, None)
        return made


def copy_checkpoint(source: Storage, target: Storage, step: int) -> int:
    """Copy a whole checkpoint of a run into another run's folder; returns its step, 0 when there is none.

    It is the one of `step`, or the newest when that is gone. The index goes last, so a copy that is killed is none; one that is
    removed while it is copied is followed by another.
    """
    for _ in range(5):
        found = checkpoint.stored(source)
        if not found:
            return 0
        newest = next((one for one in found if one.step == step), found[-1])
        place = f"{checkpoint.FOLDER}/{newest.folder}"
        try:
            for name in (*newest.files, checkpoint.INDEX):
                target.write_bytes(f"{place}/{name}", source.read_bytes(f"{place}/{name}"))
        except DataError:
            target.delete(place)
        else:
            return newest.step
    return 0


def trainable() -> type:
    """The class that Ray Tune runs, one actor per trial at a time. Its keyword arguments are `Attempt`'s."""
    from ray.tune import Trainable

    class OneTrial(Trainable):  # type: ignore[misc]
        """Hands calls on to an `Attempt`; Tune's checkpoints hold only where the real ones are."""

        def setup(self, config: dict[str, Any], **fixed: Any) -> None:
            self._fixed = fixed
            self._open(config)

        def _open(self, config: dict[str, Any]) -> None:
            # A population's members exchange their configurations, numbers included; their ids are counted by Tune and stay.
            population = self._fixed["tune"].scheduler == "pbt"
            number = int(self.trial_id.rpartition("_")[2]) if population else config[NUMBER]
            self._attempt = Attempt(number=number, **self._fixed)

        def step(self) -> dict[str, Any]:
            return self._attempt.next()

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return self._attempt.passport()

        def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if checkpoint[NUMBER] != self._attempt.trial.number:
                space = self._fixed["tune"].space
                self._attempt.take_over(checkpoint, {path: self.config[path] for path in space})

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if not self._attempt.stop():
                return False
            self._open(new_config)
            return True

        def cleanup(self) -> None:
            self._attempt.stop()

    return OneTrial


def _plain(value: Any) -> float:
    """A number that can be compared: what is no number is worse than all."""
    made = float(value)
    return made if math.isfinite(made) else math.inf
