"""Which values a trial gets: Optuna's samplers behind Ray Tune's `Searcher`, and the schedulers ASHA and PBT.

Values come from the ledger first: a trial that was begun in an earlier call keeps its number and its values, and what it found is
told to the sampler. It trains nothing. Called by `train.tune`.

Ray's own Optuna wrapper is not used: its state lives in a pickle that is some seconds old when a search is killed, and it cannot
be given trials that are still open.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError
from cluster.train_config import SearchRange, TrainConfig, TuneConfig
from train import search_space
from train.search_space import Values
from train.trials import Ledger, Trial

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

METRIC, TIME, NUMBER = "validation_loss", "step", "number"
TRIES = 100


@dataclass
class Suggestions:
    """Values of the trials, in order; what Ray's `Searcher` below asks. Not safe for threads."""

    train: TrainConfig
    tune: TuneConfig
    ledger: Ledger
    _next: int = 0
    _told: set[int] = field(default_factory=set)
    _asked: dict[int, Any] = field(default_factory=dict)
    _study: Any = None

    def __post_init__(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        known = self.ledger.all()
        # Else the first new values after a resume would be those of the first trial again.
        seed = self.tune.seed + 1000 * len(known)
        if self.tune.search == "random":
            sampler = optuna.samplers.RandomSampler(seed=seed)
        else:
            # Optuna's ten trials by chance would be most of a small search.
            started = max(3, min(10, self.tune.trials // 3))
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=started, constant_liar=self.tune.concurrent > 1)
        self._study = optuna.create_study(sampler=sampler)
        for trial in known:
            if trial.ended:
                self.tell(trial)

    def next(self) -> tuple[int, Values] | None:
        """Number and values of the next trial, written to the ledger; None when there are enough."""
        number = self._next
        if number >= self.tune.trials:
            return None
        self._next += 1
        known = {trial.number: trial for trial in self.ledger.all()}
        if number in known:
            return number, known[number].values
        if number == 0 and self.tune.include_default:
            values = search_space.defaults(self.train, self.tune.space)
        else:
            values = self._ask(number)
        self.ledger.write(Trial(number, values))
        return number, values

    def _ask(self, number: int) -> Values:
        """New values that the schema takes together."""
        import optuna

        said = ""
        for _ in range(TRIES):
            asked = self._study.ask(distributions(self.tune.space))
            values = {path: _value(span, asked.params[path]) for path, span in self.tune.space.items()}
            try:
                search_space.apply(self.train, values)
            except ConfigError as error:
                said = str(error)
                self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
            else:
                self._asked[number] = asked
                return values
        raise ConfigError(f"tune.space: {TRIES} draws in a row do not make a run; the last: {said}")

    def tell(self, trial: Trial) -> None:
        """Give the sampler what a trial found."""
        import optuna

        if trial.number in self._told:
            return
        self._told.add(trial.number)
        best, asked = trial.best, self._asked.pop(trial.number, None)
        if asked is not None:
            if best is None:
                self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
            else:
                self._study.tell(asked, best.validation_loss)
        elif best is not None and search_space.contains(self.tune.space, trial.values):
            spans = distributions(self.tune.space)
            inner = {path: _inner(span, trial.values[path]) for path, span in self.tune.space.items()}
            made = optuna.trial.create_trial(value=best.validation_loss, params=inner, distributions=spans)
            self._study.add_trial(made)


def distributions(space: dict[str, SearchRange]) -> dict[str, Any]:
    """Optuna's view of the space; a choice is drawn by its place, because Optuna wants plain values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for path, span in space.items():
        if span.choice:
            made[path] = CategoricalDistribution(tuple(range(len(span.choice))))
        elif span.integer:
            made[path] = IntDistribution(round(search_space.low(span)), round(search_space.high(span)), log=span.log)
        else:
            made[path] = FloatDistribution(search_space.low(span), search_space.high(span), log=span.log)
    return made


def searcher(suggestions: Suggestions) -> Searcher:
    """Ray Tune's searcher over `suggestions`; a trial's configuration is `{"number": n, path: value, ...}`."""
    from ray.tune.search import Searcher

    class Ledgered(Searcher):  # type: ignore[misc]
        """Asks in order, tells when a trial has ended. Keeps nothing on disk: the ledger does."""

        def __init__(self) -> None:
            super().__init__(metric=METRIC, mode="min")
            self._numbers: dict[str, int] = {}

        def suggest(self, trial_id: str) -> dict[str, Any] | str:
            drawn = suggestions.next()
            if drawn is None:
                return str(Searcher.FINISHED)
            self._numbers[trial_id], values = drawn
            return {NUMBER: drawn[0], **values}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            suggestions.tell(suggestions.ledger.read(self._numbers.pop(trial_id)))

        def save(self, checkpoint_path: str) -> None:
            open(checkpoint_path, "wb").close()

        def restore(self, checkpoint_path: str) -> None:
            raise AssertionError("a search is taken up from its ledger")

    return Ledgered()


def population(train: TrainConfig, tune: TuneConfig, ledger: Ledger) -> list[Values]:
    """Values of a population's members, from the ledger or new; written to the ledger."""
    known = {trial.number: trial for trial in ledger.all()}
    chance = random.Random(tune.seed)
    members = []
    for number in range(tune.trials):
        drawn = search_space.draw(tune.space, chance)
        if number not in known:
            first = number == 0 and tune.include_default
            known[number] = ledger.write(Trial(number, search_space.defaults(train, tune.space) if first else drawn))
        members.append(known[number].values)
    return members


def scheduler(tune: TuneConfig, max_steps: int | None) -> TrialScheduler:
    """Ray Tune's scheduler.

    Args:
        tune: Which, and its numbers.
        max_steps: Steps of a whole trial, if they are known.
    """
    from ray.tune import schedulers

    if tune.scheduler == "asha":
        # One above, so that a whole trial ends by itself and is exported, and is not stopped at its last step.
        longest = max(tune.grace_steps, max_steps or 10**9) + 1
        return schedulers.ASHAScheduler(
            time_attr=TIME, grace_period=tune.grace_steps, max_t=longest, reduction_factor=tune.reduction
        )
    if tune.scheduler == "pbt":
        return _population_scheduler(tune.concurrent >= tune.trials)(
            time_attr=TIME,
            perturbation_interval=tune.grace_steps,
            hyperparam_mutations={path: mutation(span) for path, span in tune.space.items()},
            # A step of 0.8 or 1.2 may leave the range.
            custom_explore_fn=_explored(tune.space),
            # The last report has no step: nobody takes over weights that have no step left to train.
            require_attrs=False,
            log_config=False,
        )
    return schedulers.FIFOScheduler()


def _population_scheduler(room: bool) -> type[TrialScheduler]:
    """PBT. With `room` for all members at once none is paused for another: a pause ends a member's workers."""
    from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

    class Population(PopulationBasedTraining):  # type: ignore[misc]
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = str(super().on_trial_result(tune_controller, trial, result))
            return str(TrialScheduler.CONTINUE) if room and decision == TrialScheduler.PAUSE else decision

    return Population


def mutation(span: SearchRange) -> Any:
    """How a population changes a value: to a neighbour among the choices, or by a factor of 0.8 or 1.2."""
    from ray import tune as ray_tune

    if span.choice:
        return list(span.choice)
    low, high = search_space.low(span), search_space.high(span)
    if span.integer:
        made = ray_tune.lograndint if span.log else ray_tune.randint
        return made(round(low), round(high) + 1)
    return ray_tune.loguniform(low, high) if span.log else ray_tune.uniform(low, high)


def _explored(space: dict[str, SearchRange]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def inside(config: dict[str, Any]) -> dict[str, Any]:
        return search_space.clamp(space, config)

    return inside


def _value(span: SearchRange, inner: Any) -> Any:
    return span.choice[inner] if span.choice else inner


def _inner(span: SearchRange, value: Any) -> Any:
    if not span.choice:
        return value
    return next(spot for spot, choice in enumerate(span.choice) if search_space.same(value, choice))
