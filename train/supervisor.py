"""The actor that owns a run: it prepares the data, lets Ray Train run the workers, and keeps the run's books.

One per run, without a CPU of its own, unless it is also the run's only worker. In a cluster that outlives the command it is
detached and Ray restarts it, so a run needs neither the command nor this process to stay alive: it begins again from the newest
checkpoint. Workers tell it what happens (`began`, `tell`, `saved`, `fail`, ...), the command asks (`follow`). It holds no
tensors and decides nothing about training. Made by `train.run`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cluster.errors import TidepoolError
from cluster.train_config import SPINS, TrainConfig
from train.checkpoint import Checkpoint
from train.log import RunLog
from train.meter import Meter
from train.storage import Storage
from train.zero import deepspeed_config

RUN = "run.json"
LINGER_S = 60.0  # a finished run stays this long for a command that wants its result
KEPT = 4096  # newest lines of metrics that a command can still ask for; all are in metrics.jsonl
LESS_MEMORY = (
    "lower train.micro_batch_size or train.data.max_length, turn on train.activation_checkpointing, or raise train.zero.stage"
)
TOLD = "told"  # the actor's group, of one thread, for what workers tell
NAMESPACE = "tidepool-train"


class Supervisor:
    """See the module. Work begins in a thread of `__init__`, so that it also begins after Ray restarted the process.

    Args:
        config: `TrainConfig` as JSON, with absolute paths.
        detached: Whether the run outlives its command; then the actor ends itself when all is done.
        before: Seconds spent before this actor was asked for, by cause.
    """

    def __init__(self, config: dict[str, Any], detached: bool, before: dict[str, float]) -> None:
        self.begun = time.monotonic()
        # Read when torch is imported. Threads that wait busily for each other take a loaded machine's cores from the ones they
        # wait for (a step on two threads was ten times slower); those that sleep at once wake too late (half the speed).
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        self.config = TrainConfig.model_validate(config)
        self.detached = detached
        self.run = Storage.open(self.config.output).below(self.config.name)
        self.lock = threading.RLock()
        self.said: list[str] = []
        self.fatal: str | None = None
        self.done = False
        self.read = threading.Event()
        self.steps = 0
        self.startup: dict[str, float] = dict(before)
        self.fitted = self.begun
        self.log: RunLog | None = None
        self.news: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.told = 0
        self.meter: Meter | None = None
        self.book: dict[str, Any] = {}
        threading.Thread(target=self._work, name="run", daemon=True).start()

    # What the command asks.

    def follow(self, lines: int, said: int) -> dict[str, Any]:
        """News since the `lines`-th line of metrics and the `said`-th of text; `done` when there will be no more.

        A step's line comes once more when its validation loss is known, and again when the run goes back to a checkpoint.
        """
        with self.lock:
            fresh = min(self.told - lines, len(self.news))
            news = {
                "lines": list(self.news)[len(self.news) - fresh :], "count": self.told, "said": self.said[said:],
                "steps": self.steps, "done": self.done, "error": self.fatal, "result": self.book.get("result"),
            }  # fmt: skip
        if news["done"]:
            self.read.set()
        return news

    def same(self, config: dict[str, Any]) -> bool:
        """Whether this is the run of a configuration."""
        return self.config == TrainConfig.model_validate(config)

    def stop(self) -> None:
        """End the run after the step that is being done; workers that are only starting do none."""
        self.fail("stopped")

    # What workers tell.

    def enter(self, rank: int, workers: int) -> str | None:
        """A worker starts; the answer is why it must not, if so."""
        with self.lock:
            if rank == 0:
                self.startup.setdefault("workers", round(time.monotonic() - self.fitted, 3))
            return self.fatal

    def began(self, step: int, steps: int, workers: int, seconds: dict[str, float]) -> None:
        """An attempt is about to do its first step."""
        with self.lock:
            assert self.log is not None
            self.steps = steps
            self.log.rewind(step)
            attempt = {"at": time.time(), "workers": workers, "from_step": step, "steps": steps, "seconds": seconds}
            attempt["deepspeed"] = deepspeed_config(self.config, workers, steps)
            self.book.setdefault("attempts", []).append(attempt)
            if self.meter is not None:
                self.meter.holds(workers)
            self._keep()
            self.said.append(f"{workers} worker{'s' if workers > 1 else ''}, step {step} of {steps}")

    def timed(self, seconds: dict[str, float]) -> None:
        """The first step of an attempt is done."""
        with self.lock:
            self.book["attempts"][-1]["seconds"] = seconds
            if "first_step" not in self.startup:
                self.startup |= seconds
            self.book["startup"] = self.startup
            self._keep()

    def tell(self, lines: list[dict[str, Any]]) -> bool:
        """Steps done; the answer is whether to stop."""
        with self.lock:
            self._announce(lines)
            self._told(lambda log: log.add(lines))
            if self.meter is not None:
                self.meter.stepped(lines)
            return self.fatal is not None

    def measured(self, step: int, loss: float) -> None:
        """A validation loss."""
        with self.lock:
            if self.news and self.news[-1]["step"] == step:
                self._announce([{**self.news[-1], "validation_loss": loss}])
            self._told(lambda log: log.measured(step, loss))

    def saved(self, made: Checkpoint) -> None:
        """A checkpoint is whole."""
        with self.lock:
            self.book["checkpoint"] = {"step": made.step, "bytes": made.bytes, "seconds": made.seconds}
            self.book["checkpoint_bytes"] = self.book.get("checkpoint_bytes", 0) + made.bytes
            self._told(lambda log: log.flush())
            self._keep()
            self._cost(made.bytes)

    def ended(self, step: int) -> None:
        """All steps are done and exported."""
        with self.lock:
            self.book["ended"] = step

    def fail(self, line: str) -> None:
        """Something that would happen again: no further attempt trains."""
        with self.lock:
            self.fatal = self.fatal or line

    # The run itself.

    def _work(self) -> None:
        try:
            self._train()
        except TidepoolError as error:
            self.fail(str(error))
        finally:
            self._close()
        if self.detached:
            self.read.wait(LINGER_S)
            _end_self()

    def _train(self) -> None:
        from train.data import place, prepare, total_steps
        from train.models import base_folder

        config = self.config
        self.run.check_writable()
        old = self.run.read_json(RUN) if self.run.exists(RUN) else {}
        with self.lock:
            self.book = {**old, "config": config.model_dump(mode="json"), "state": "running", "error": None, "result": None}
            self.book.setdefault("started", time.time())
            self.book.pop("ended", None)
            self._keep()
            self.log = RunLog(self.run, config.name)
        base = base_folder(config.base)
        self.meter = Meter(config, self.run, base)
        tokenizer = str(base)
        into = place(config.data, self.run)
        ready = prepare(config.data, config.objective, tokenizer, into, "train", self._say)
        measured = None
        if config.data.validation:
            measured = prepare(config.data, config.objective, tokenizer, into, "validation", self._say)
        with self.lock:
            self.startup["prepare"] = round(time.monotonic() - self.begun, 3)
            self.steps = total_steps(ready.sequences, config.batch_size, config.epochs, config.max_steps)
            self.meter.read(ready.bytes_read, into.size(ready.path) / ready.sequences)
            self.meter.holds(config.scale.bounds[1])
            self.book["data"] = {"sequences": ready.sequences, "tokens": ready.tokens, "trained_tokens": ready.trained_tokens}
        self._fit(ready.path, measured.path if measured else None)

    def _fit(self, train_data: str, validation_data: str | None) -> None:
        """Run the workers until they are done or nothing helps."""
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        if not self.detached:
            # A watcher for nodes that a cloud takes back: there are none in a cluster of the command's own.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError

        from train.loop import Task, work

        scale = self.config.scale
        resources = {"CPU": scale.cpus_per_worker} | ({"GPU": 1.0} if scale.device == "gpu" else {})
        low, high = scale.bounds
        alone = runs_here(self.config)
        task = Task(self.config.model_dump(mode="json"), train_data, validation_data, ray.get_runtime_context().current_actor)
        trainer = TorchTrainer(
            lambda: work(task),
            scaling_config=ScalingConfig(
                # 0 is Ray Train's word for "in this process".
                num_workers=0 if alone else high if low == high else (low, high),
                use_gpu=scale.device == "gpu",
                resources_per_worker=resources,
                accelerator_type=scale.accelerator_type,
                elastic_resize_monitor_interval_s=scale.resize_every_s,
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=self.run.root,
                storage_filesystem=self.run.filesystem,
                failure_config=FailureConfig(max_failures=scale.max_failures),
                callbacks=[_watch(task.supervisor)],
            ),
        )
        self.startup["supervisor"] = round(time.monotonic() - self.begun - self.startup.get("prepare", 0.0), 3)
        self.fitted = time.monotonic()
        try:
            trainer.fit()
        except TrainingFailedError as error:
            self.fail(f"the run failed {scale.max_failures + 1} times, last with: {_last_line(error)}")
        except RuntimeError as error:
            if not alone:
                raise
            self.fail(f"the run failed with: {_last_line(error)}")

    def _close(self) -> None:
        with self.lock:
            if self.log is not None:
                self._told(lambda log: log.close())
            if self.fatal is None and "ended" not in self.book:
                self.fatal = "the run stopped before its last step; see Ray's logs"
            self.book["state"] = "finished" if self.fatal is None else "failed"
            self.book["error"] = self.fatal
            self.book["seconds"] = round(self.book.get("seconds", 0.0) + time.monotonic() - self.begun, 3)
            if self.fatal is None:
                self.book["result"] = self._result()
            self._keep()
            self._cost()
            self.done = True

    def _result(self) -> dict[str, Any]:
        assert self.log is not None
        lines = self.log.lines
        measured = [line for line in lines if line.get("validation_loss") is not None]
        best = min(measured, key=lambda line: line["validation_loss"]) if measured else None
        return {
            "name": self.config.name,
            "steps": self.book["ended"],
            "loss": lines[-1]["loss"] if lines else None,
            "validation_loss": measured[-1]["validation_loss"] if measured else None,
            "best_step": best["step"] if best else None,
            "export": self.run.name("export"),
            "seconds": self.book["seconds"],
        }

    def _announce(self, lines: list[dict[str, Any]]) -> None:
        self.news.extend(lines)
        self.told += len(lines)

    def _told(self, write: Callable[[RunLog], None]) -> None:
        """Write to the log; where that fails, the run goes on to its next checkpoint, which then fails with the reason."""
        if self.log is None:
            return
        try:
            write(self.log)
        except TidepoolError as error:
            self.said.append(f"log not written: {error}")

    def _say(self, text: str) -> None:
        with self.lock:
            self.said.append(text)

    def _cost(self, saved: int = 0) -> None:
        """Bring cost.json up to date; a checkpoint of `saved` bytes was written."""
        if self.meter is None:
            return
        if saved:
            self.meter.saved(saved)
        try:
            self.meter.write()
        except TidepoolError as error:
            self.said.append(f"cost.json not written: {error}")

    def _keep(self) -> None:
        try:
            self.run.write_json(RUN, self.book)
        except TidepoolError as error:
            self.said.append(f"run.json not written: {error}")


def runs_here(config: TrainConfig) -> bool:
    """Whether the only worker of a run is a thread of its supervisor: on a CPU that saves the start of six more processes."""
    return config.scale.bounds == (1, 1) and config.scale.device == "cpu"


def _watch(supervisor: Any) -> Any:
    """What Ray Train's controller calls when workers die: some deaths would come again with every new start."""
    from ray.train import UserCallback

    class Watch(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if any("running low on memory" in str(error) for error in worker_exceptions.values()):
                line = f"a worker was ended because its node ran out of memory; {LESS_MEMORY}"
                supervisor.fail.remote(line)

    return Watch()


def _end_self() -> None:
    import ray

    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
