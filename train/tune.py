"""`python -m train tune CONFIG`: a search over fields of a training configuration, with Ray Tune.

Each trial is a whole training run of its own, with as many workers as the configuration says, on the shared cluster; Tune decides
which goes on. The memory of the search is its ledger (`train.trials`), so the same command takes a killed search up again: ended
trials are told to Tune from the ledger and not trained again, open ones go on from their runs' checkpoints. Called by
`python -m train`.

Nothing stays outside the search's folder, and no placement group or worker stays behind: `settle` waits until Ray has none left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.config import Config
from cluster.errors import ConfigError, TrainError
from cluster.session import session_of
from cluster.train_config import TrainConfig, TuneConfig
from train import search_report, search_space, suggest
from train.run import absolute
from train.trial import Runner, train_run, trainable
from train.trials import Ledger, Trial, gainless

if TYPE_CHECKING:
    from ray.tune import Callback, Stopper

SCRATCH = "tune"  # Ray Tune's own files, below the search's folder; gone when the search ends
RETRIES = 3  # of a trial whose process or node was lost
FAILURES = 3  # trials that may fail before one that does not
SETTLE_S = 60.0
NAMESPACE = "tidepool-tune"
LOOK_S = 0.2
VARIABLES = {
    # Workers stay where they are: paths are made absolute here, and a folder per trial would be one more place.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The ledger is the log, and our lines are the screen.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # Ctrl-C ends the command; the search goes on at the next call.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


@dataclass(frozen=True)
class Outcome:
    """What a search found. `folder` holds the report; `reason` says why it ended."""

    folder: str
    trials: tuple[Trial, ...]
    best: Trial
    reason: str


def tune(config: Config, *, say: Callable[[str], None], runner: Runner = train_run) -> Outcome:
    """Run or take up a search, and write its report.

    Args:
        config: With `train` and `tune`.
        say: Gets lines for a person.
        runner: Trains one configuration; another one than `train.run.train` only in tests.

    Raises:
        ConfigError: the space cannot be searched.
        TrainError: no trial has a validation loss, or the folder holds another search.
        DataError: the data cannot be read.
    """
    if config.train is None or config.tune is None:
        raise ConfigError("tune: write `train` (what is trained) and `tune` (what is searched) in the configuration")
    train, search = absolute(config.train), config.tune
    search_space.check(search, train)
    ledger = Ledger.of(train)
    ledger.begin(train, search)
    known = ledger.all()
    if known:
        ended = sum(trial.ended for trial in known)
        say(f"search {train.name}: taken up with {ended} ended and {len(known) - ended} open trials")
    watch = Watch(ledger, train, search, say)
    if watch.reason is None:
        from train.connect import connected

        cpus = search.concurrent * train.scale.bounds[1] * train.scale.cpus_per_worker
        with connected(config, cpus, NAMESPACE):
            before = set(placement_groups())
            prepare(ledger, train, say)
            _search(ledger, train, search, watch, runner)
            settle(before, say)
    # Matplotlib keeps a list of fonts.
    os.environ.setdefault("MPLCONFIGDIR", str(session_of(config).run_dir / "cache" / "matplotlib"))
    for line in search_report.write(ledger, train, search):
        say(line)
    trials = tuple(trial for trial in ledger.all() if trial.ended)
    best = search_report.best(trials)
    if best is None:
        first = next((trial.error for trial in trials if trial.error), "none was started")
        raise TrainError(f"search {train.name}: no trial has a validation loss; the first error: {first}")
    return Outcome(ledger.folder.uri, trials, best, watch.reason or "interrupted")


def prepare(ledger: Ledger, train: TrainConfig, say: Callable[[str], None]) -> None:
    """Prepare the data once for all trials, and find what is wrong with it before there are any."""
    from train.data import place
    from train.data import prepare as prepare_split
    from train.models import base_folder

    into, tokenizer = place(train.data, ledger.folder), str(base_folder(train.base))
    prepare_split(train.data, train.objective, tokenizer, into, "train", say)
    prepare_split(train.data, train.objective, tokenizer, into, "validation", say)


class Watch:
    """Follows the trials: closes them in the ledger, says how each ended, and when the search is over."""

    def __init__(self, ledger: Ledger, train: TrainConfig, search: TuneConfig, say: Callable[[str], None]) -> None:
        self.ledger, self.train, self.search, self.say = ledger, train, search, say
        # In the order in which they ended, as far as it is known; before this call that is the order of their numbers.
        self.ended = [trial for trial in ledger.all() if trial.ended]
        self.reason: str | None = None
        self.look()

    def end(self, number: int, failed: str = "") -> None:
        """A trial has ended for Tune; one that did not end by itself was stopped."""
        if any(trial.number == number for trial in self.ended):
            return
        self.ended.append(self.ledger.end(number, "failed" if failed else "stopped", failed))
        self.say(search_report.progress(self.ended, self.train))
        before = self.reason
        self.look()
        if before is None and self.reason is not None and len(self.ended) < self.search.trials:
            self.say(f"search {self.train.name} ends: {self.reason}")

    def look(self) -> None:
        """Set `reason` when there is nothing more to try; it stays."""
        if self.reason is not None:
            return
        limit = self.search.stop_after
        if len(self.ended) >= self.search.trials:
            self.reason = "all trials have ended"
        elif limit is not None and len(self.ended) > limit and gainless(self.ended) >= limit:
            self.reason = f"{limit} trials in a row brought no gain"
        elif len(self.ended) >= FAILURES and all(trial.state == "failed" for trial in self.ended):
            self.reason = f"the first {FAILURES} trials failed"


def _search(ledger: Ledger, train: TrainConfig, search: TuneConfig, watch: Watch, runner: Runner) -> None:
    """Let Ray Tune run until `watch` has a reason to end or all trials have ended."""
    from ray import tune as ray_tune

    fixed = {"ledger": ledger, "train": train, "tune": search, "runner": runner}
    space: dict[str, Any] = {}
    algorithm = None
    if search.scheduler == "pbt":
        # A population has no searcher: Tune counts its members, and each looks up its values.
        members = suggest.population(train, search, ledger)
        space = {suggest.NUMBER: ray_tune.grid_search(list(range(search.trials)))}
        space |= {path: ray_tune.sample_from(_member(members, path)) for path in search.space}
    else:
        algorithm = suggest.searcher(suggest.Suggestions(train, search, ledger))
    ledger.folder.delete(SCRATCH)
    with _variables(), _quiet():
        tuner = ray_tune.Tuner(
            # Some resource has to be asked for: memory that every node has, so that all CPUs and GPUs stay for the workers.
            ray_tune.with_resources(ray_tune.with_parameters(trainable(), **fixed), {"memory": 2**20}),
            param_space=space,
            tune_config=ray_tune.TuneConfig(
                metric=suggest.METRIC,
                mode="min",
                search_alg=algorithm,
                scheduler=suggest.scheduler(search, train.max_steps),
                num_samples=1 if algorithm is None else search.trials,
                max_concurrent_trials=search.concurrent,
                # A trial's process has imported everything that the next one needs.
                reuse_actors=True,
            ),
            run_config=ray_tune.RunConfig(
                name=SCRATCH,
                storage_path=ledger.folder.uri,
                stop=_stopper(watch),
                callbacks=[_callback(watch)],
                failure_config=ray_tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
        tuner.fit()
    ledger.folder.delete(SCRATCH)


def _member(members: list[search_space.Values], path: str) -> Callable[[Any], Any]:
    return lambda spec: members[spec.config[suggest.NUMBER]][path]


def _callback(watch: Watch) -> Callback:
    from ray.tune import Callback

    class Ends(Callback):  # type: ignore[misc]
        """Tells the watch which trial has ended."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            watch.end(_number(trial))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            lines = [line for line in str(trial.get_error()).splitlines() if line.strip()]
            watch.end(_number(trial), lines[-1].strip() if lines else "its process ended")

        def __getstate__(self) -> dict[str, Any]:
            # Tune keeps a copy of its callbacks for a resume of its own, which is not used.
            return {}

    return Ends()


def _stopper(watch: Watch) -> Stopper:
    from ray.tune import Stopper

    class Enough(Stopper):  # type: ignore[misc]
        """Ends the search when the watch has a reason."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return watch.reason is not None

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Enough()


def _number(trial: Any) -> int:
    """A trial's number in the ledger; see `train.trial` for a population's."""
    if suggest.NUMBER in trial.evaluated_params and "_" not in trial.trial_id:
        return int(trial.evaluated_params[suggest.NUMBER])
    return int(trial.trial_id.rpartition("_")[2])


def settle(before: set[str], say: Callable[[str], None]) -> None:
    """Wait until no placement group of this search is left, and say so when one is.

    A trial that is stopped ends its workers before it answers, and what Ray lost on the way is removed by Ray itself within
    seconds of the end of the process that owned it. This holds the command until both have happened.

    Args:
        before: `placement_groups()` before the search.
        say: Gets lines for a person.
    """
    limit = time.monotonic() + SETTLE_S
    while (left := set(placement_groups()) - before) and time.monotonic() < limit:
        time.sleep(LOOK_S)
    for name in left:
        say(f"placement group {name} was not given back within {SETTLE_S:.0f} s; `ray list placement-groups` shows whose it is")


def placement_groups() -> list[str]:
    """Ids of the placement groups that hold or wait for resources, of all jobs."""
    import ray

    return [name for name, entry in ray.util.placement_group_table().items() if entry["state"] != "REMOVED"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune misses its own log files, which nobody reads; errors are still said."""
    import ray.tune  # its loggers get their level when they are imported

    logger = logging.getLogger(ray.tune.__name__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _variables() -> Iterator[None]:
    """Tune reads its switches from the environment of the process that calls it."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(VARIABLES)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
