"""The ledger of a search: one small file per trial, written before the trial starts and at each of its validation losses.

It is the only memory of a search. A search that was killed is taken up by reading it: a trial that had ended is told to the
scheduler again from here and is not trained again, one that had not goes on from its run's own checkpoints. Ray Tune's own state
is not needed for that and is thrown away. Written by `train.trial` (progress) and `train.tune` (how a trial ended), not at once.

Below `<output>/<name>-search/`: `search.json` (what is searched), `trials/000.json`, `runs/trial-000/` (an ordinary run).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cluster.errors import TrainError
from cluster.train_config import TrainConfig, TuneConfig
from train.search_space import Values
from train.storage import Storage

State = Literal["running", "finished", "stopped", "failed"]
HEADER, TRIALS, RUNS = "search.json", "trials", "runs"
# What may change between two calls of the same search: how much of it there is.
FREE = ("trials", "concurrent", "stop_after")


@dataclass(frozen=True)
class Report:
    """A validation loss of a trial. `seconds` is the time spent on the trial until then, of all attempts and generations."""

    step: int
    validation_loss: float
    loss: float | None
    seconds: float
    generation: int = 0


@dataclass(frozen=True)
class Trial:
    """One trial. `generation` counts how often a population's member took over another's weights; each has its own run."""

    number: int
    values: Values
    state: State = "running"
    generation: int = 0
    seconds: float = 0.0
    reports: tuple[Report, ...] = ()
    error: str = ""

    @property
    def best(self) -> Report | None:
        """The report with the lowest validation loss, among those with the present values."""
        present = (report for report in self.reports if report.generation == self.generation)
        return min(present, key=lambda report: report.validation_loss, default=None)

    @property
    def step(self) -> int:
        """The step of the last report."""
        return self.reports[-1].step if self.reports else 0

    @property
    def ended(self) -> bool:
        """Whether it is not to be trained any more."""
        return self.state != "running"

    @property
    def run(self) -> str:
        """Name of its training run, below `runs/`."""
        return f"trial-{self.number:03d}" + (f"-{self.generation}" if self.generation else "")


@dataclass(frozen=True)
class Ledger:
    """The files of a search; can be sent to another process."""

    folder: Storage

    @classmethod
    def of(cls, train: TrainConfig) -> Ledger:
        """The ledger of the search over a configuration."""
        return cls(Storage.open(train.output).below(f"{train.name}-search"))

    def begin(self, train: TrainConfig, tune: TuneConfig) -> None:
        """Write down what is searched, or compare with what is written.

        Raises:
            TrainError: the folder holds another search, or cannot be written.
        """
        searched = {"train": train.model_dump(mode="json"), "tune": tune.model_dump(mode="json", exclude=set(FREE))}
        # Where it lies and what it costs change nothing in what was found.
        for name in ("output", "price"):
            del searched["train"][name]
        if self.folder.exists(HEADER):
            found = json.loads(self.folder.read_bytes(HEADER))
            if found != searched:
                changed = ", ".join(_differences(found, searched))
                raise TrainError(
                    f"{self.folder.uri}: holds a search with other values of {changed}; change train.name, or delete the folder"
                )
        else:
            self.folder.check_writable()
            self.folder.write_bytes(HEADER, json.dumps(searched, indent=1).encode())

    def write(self, trial: Trial) -> Trial:
        """Keep a trial's present state; returns it."""
        text = json.dumps(asdict(trial), indent=1)
        self.folder.write_bytes(f"{TRIALS}/{trial.number:03d}.json", text.encode())
        return trial

    def read(self, number: int) -> Trial:
        """A trial by its number."""
        data: dict[str, Any] = json.loads(self.folder.read_bytes(f"{TRIALS}/{number:03d}.json"))
        return Trial(**data | {"reports": tuple(Report(**report) for report in data["reports"])})

    def all(self) -> list[Trial]:
        """All trials, by number."""
        return [self.read(int(name.removesuffix(".json"))) for name in self.folder.list(TRIALS) if name.endswith(".json")]

    def end(self, number: int, state: State, error: str = "") -> Trial:
        """Close a trial that is still open; one that has ended stays as it is."""
        trial = self.read(number)
        return trial if trial.ended else self.write(replace(trial, state=state, error=error))

    def runs(self) -> Storage:
        """Where the trials' training runs are."""
        return self.folder.below(RUNS)


def gainless(trials: Iterable[Trial]) -> int:
    """How many of the trials, in the given order, ended since the best one; all of them when none has a validation loss."""
    best, since = float("inf"), 0
    for trial in trials:
        loss = trial.best.validation_loss if trial.best else float("inf")
        since = 0 if loss < best else since + 1
        best = min(best, loss)
    return since


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        below = (_differences(one.get(name), other.get(name), f"{path}.{name}") for name in {**one, **other})
        return [name for names in below for name in names]
    return [] if one == other else [path.lstrip(".")]
