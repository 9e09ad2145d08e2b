"""`train`: start a run, or join or resume the one of that name, and follow it to its end.

The work is done by the run's supervisor, an actor (`train.supervisor`); this process only shows progress. In a cluster that
outlives the command the supervisor is detached: a command that dies takes nothing with it, and the same command joins again. In a
private cluster everything ends with the command, and the same command resumes from the newest checkpoint. Called by
`python -m train` and, inside a trial, by `train.tune`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import TidepoolError, TrainError, one_line
from cluster.train_config import TrainConfig
from train.storage import Storage
from train.supervisor import NAMESPACE, RUN, TOLD, Supervisor, runs_here
from train.zero import deepspeed_config

Say = Callable[[str], None]
OnStep = Callable[[dict[str, Any]], None]
LOOK_S = 0.2  # how often the supervisor is asked for news


@dataclass(frozen=True)
class Result:
    """How a run ended. `export` is the address of the Hugging Face folder or the PEFT adapter, `seconds` of all its starts."""

    name: str
    steps: int
    loss: float | None
    validation_loss: float | None
    best_step: int | None
    export: str
    seconds: float


def checked(config: TrainConfig) -> TrainConfig:
    """The configuration as a run takes it: possible, and with absolute paths.

    Raises:
        TrainError: DeepSpeed cannot be told what the file says.
    """
    low, high = config.scale.bounds
    for workers in range(low, high + 1):
        deepspeed_config(config, workers, 1)
    return absolute(config)


def absolute(train: TrainConfig) -> TrainConfig:
    """The configuration with local paths made absolute: workers and trials run in other folders, and so may best.yaml."""

    def whole(path: str) -> str:
        # `dataset:`, `scratch:` and URIs are no paths; a base that is no folder here is a repository's name.
        return path if ":" in path else str(Path(path).expanduser().absolute())

    data = train.data.model_copy(
        update={
            "train": tuple(map(whole, train.data.train)),
            "validation": tuple(map(whole, train.data.validation)),
            "prepared": whole(train.data.prepared) if train.data.prepared else None,
        }
    )
    zero = train.zero.model_copy(update={"nvme_path": whole(train.zero.nvme_path) if train.zero.nvme_path else None})
    base = whole(train.base) if Path(train.base).expanduser().is_dir() else train.base
    return train.model_copy(update={"output": whole(train.output), "base": base, "data": data, "zero": zero})


def train(
    config: TrainConfig,
    *,
    say: Say,
    on_step: OnStep | None = None,
    stop: Callable[[], bool] | None = None,
    detached: bool = False,
    before: dict[str, float] | None = None,
) -> Result:
    """Run to the end. This process must be connected to Ray.

    Args:
        config: The run.
        say: Takes lines of progress.
        on_step: Takes each step's line of metrics.jsonl, in order; once more with `validation_loss` where that was measured.
        stop: Asked several times a second; when it says yes, the run ends, workers first, with a TrainError.
        detached: The run outlives this process; joins it when it runs already.
        before: Seconds spent on starting so far, by cause, for the run's books.

    Raises:
        TidepoolError: the run cannot start or go on; checkpoints are whole.
    """
    import ray

    config = checked(config)
    _check_resources(config, say)
    old = finished(config)
    if old is not None:
        say(f"{config.name}: finished before, {old.steps} steps; change train.name to train again")
        return old
    actor = ray.remote(concurrency_groups={TOLD: 1})(Supervisor).options(
        num_cpus=config.scale.cpus_per_worker if runs_here(config) else 0,
        max_concurrency=16,
        # Not inside the placement group of a trial, which holds nothing for its workers.
        scheduling_strategy="DEFAULT",
        name=f"tidepool-train-{config.name}" if detached else None,
        namespace=NAMESPACE if detached else None,
        lifetime="detached" if detached else None,
        get_if_exists=detached,
        max_restarts=-1 if detached else config.scale.max_failures,
    )
    supervisor = actor.remote(config.model_dump(mode="json"), detached, before or {})
    if not ray.get(supervisor.same.remote(config.model_dump(mode="json"))):
        raise TrainError(f"{config.name}: a run of this name is going on with another configuration; wait, or change train.name")
    leave = False
    try:
        result = _follow(config, supervisor, say, on_step, stop)
        leave = True
        return result
    except (TidepoolError, SystemExit):
        leave = True
        raise
    finally:
        # Ctrl-C, or a trial that is told to end: the run stops. A command that is ended otherwise leaves a detached run alone.
        # One that is of no use to others gives its CPU back at once, not when Python forgets it.
        if not leave or not detached:
            ray.kill(supervisor, no_restart=True)


def finished(config: TrainConfig) -> Result | None:
    """The result of a run that has been done with this very configuration."""
    run = Storage.open(config.output).below(config.name)
    book = run.read_json(RUN) if run.exists(RUN) else {}
    if book.get("state") != "finished" or book.get("config") != config.model_dump(mode="json"):
        return None
    return Result(**book["result"])


def _follow(config: TrainConfig, supervisor: Any, say: Say, on_step: OnStep | None, stop: Callable[[], bool] | None) -> Result:
    import ray
    from ray.exceptions import ActorUnavailableError, RayActorError

    lines = said = 0
    while True:
        if stop is not None and stop():
            supervisor.stop.remote()
            stop = None
        try:
            news = ray.get(supervisor.follow.remote(lines, said))
        except ActorUnavailableError:
            # Restarting; it begins its books again.
            lines = said = 0
            time.sleep(LOOK_S)
            continue
        except RayActorError as error:
            old = finished(config)
            if old is not None:
                return old
            raise TrainError(
                f"{config.name}: the run's supervisor died ({one_line(error)}); the same command resumes it"
            ) from error
        for text in news["said"]:
            say(text)
        for line in news["lines"]:
            if on_step is not None:
                on_step({**line, "steps": news["steps"]})
        said += len(news["said"])
        lines = news["count"]
        if news["done"]:
            if news["error"] is not None:
                raise TrainError(f"{config.name}: {news['error']}")
            return Result(**news["result"])
        time.sleep(LOOK_S)


def _check_resources(config: TrainConfig, say: Say) -> None:
    """Say what the cluster lacks; a cluster that grows will bring it."""
    import ray

    low, _ = config.scale.bounds
    have = ray.cluster_resources()
    need = {"CPU": low * config.scale.cpus_per_worker, "GPU": low if config.scale.device == "gpu" else 0}
    short = [f"{need[kind]:g} {kind}s (it has {have.get(kind, 0.0):g})" for kind in need if have.get(kind, 0.0) < need[kind]]
    if short:
        say(f"waiting for the cluster to have {' and '.join(short)}")
