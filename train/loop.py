"""What each worker of a run does: batches by step number, forward, backward, step, and now and then a validation or a checkpoint.

`work` is Ray Train's `train_loop_per_worker`. A step's loss is the mean over all trained tokens (or pairs) of the global batch,
whatever the number of workers and micro batches. On a GPU nothing waits for the device between two log points. Beside DeepSpeed's
own exchange there is one all-reduce per step, of what the step gave and what the next one will be divided by. Worker 0 tells the
run's supervisor (`train.supervisor`) what happens, about once per second; the other files it writes are checkpoints. It decides
nothing about faults: it raises, or, for a mistake that a retry would repeat, tells the supervisor first.
"""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.errors import TidepoolError, TrainError
from cluster.train_config import TrainConfig
from train import engine, losses
from train.objective import Objective
from train.schedule import learning_rate
from train.supervisor import LESS_MEMORY, TOLD

if TYPE_CHECKING:
    import torch

LOG_EVERY = {"cpu": 1, "gpu": 10}  # steps between two looks at the device
TELL_S = 1.0  # lines of metrics are told this often at most, but always before what belongs to them


@dataclass(frozen=True)
class Task:
    """What a worker is given. `supervisor` is an actor handle of `train.supervisor.Supervisor`."""

    config: dict[str, Any]
    train_data: str  # path of the prepared sequences below the run's folder
    validation_data: str | None
    supervisor: Any


def work(task: Task) -> None:
    """Train until the last step, from the newest checkpoint. Runs in every worker."""
    import ray

    begun = time.monotonic()
    import ray.train

    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if ray.get(task.supervisor.enter.remote(rank, workers)) is not None:
        return  # an attempt before this one failed for good; Ray Train need not know
    config = TrainConfig.model_validate(task.config)
    engine.group_alone()
    try:
        worker = Worker(config, task, rank, workers, context.get_local_world_size(), begun)
        worker.run()
        if rank == 0 and not worker.stopping:
            ray.get(told(task.supervisor, "ended", worker.step))
    except (TidepoolError, MemoryError, RuntimeError) as error:
        line = final(error, config)
        if line is None:
            raise
        ray.get(task.supervisor.fail.remote(line))
        raise TrainError(line) from error


def told(supervisor: Any, what: str, *values: Any) -> Any:
    """Tell the supervisor, in order: it has one thread for all that workers tell. Returns the answer's reference."""
    return getattr(supervisor, what).options(concurrency_group=TOLD).remote(*values)


def final(error: BaseException, config: TrainConfig) -> str | None:
    """The line for a failure that would come again; None for one that a new start may get over."""
    import torch

    if isinstance(error, TidepoolError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"out of {'GPU' if config.scale.device == 'gpu' else 'main'} memory; {LESS_MEMORY}"
    return None


class Worker:
    """One worker's state during one attempt; all of them together make the engine, restore it and do the steps.

    Args:
        config: The run.
        task: Its data, and whom to tell.
        rank: Of this worker.
        workers: Of this attempt.
        workers_here: Those that share this machine's cores.
        begun: When the attempt began, by `time.monotonic`.
    """

    def __init__(self, config: TrainConfig, task: Task, rank: int, workers: int, workers_here: int, begun: float) -> None:
        from train import checkpoint, models, state
        from train.data import Sequences, place, total_steps
        from train.storage import Storage
        from train.zero import micro_batches

        self.config, self.task, self.rank, self.workers = config, task, rank, workers
        self.marks = [("start", begun)]
        engine.prepare_process(config, workers_here)
        self._import()
        self._mark("imports")
        self.run_folder = Storage.open(config.output).below(config.name)
        sequences = place(config.data, self.run_folder)
        self.data = Sequences.open(sequences, task.train_data)
        self.validation = Sequences.open(sequences, task.validation_data) if task.validation_data else None
        self.steps = total_steps(len(self.data), config.batch_size, config.epochs, config.max_steps)
        self.micro, _ = micro_batches(config, workers)
        self._mark("data")
        self.device = engine.device_of(config)
        self.base = models.base_folder(config.base)
        model = models.build(config, self.base)
        self.objective = Objective(config, model, self.device)
        self._mark("model")
        self.engine = engine.start(config, model, workers, self.steps)
        self._mark("engine")
        attempt = self._same(uuid.uuid4().hex[:8])
        found = self._same(checkpoint.latest(self.run_folder))
        self.step = 0
        self.last_validation: tuple[int, float] | None = None
        self.identity = {
            "base": config.base, "objective": config.objective,
            "lora": config.lora.model_dump(mode="json") if config.lora else None,
        }  # fmt: skip
        if found is not None:
            if found.model != self.identity:
                raise TrainError(
                    f"{self.run_folder.name()} holds a run of another model; choose another train.name or train.output"
                )
            state.restore(self.engine, checkpoint.read(self.run_folder, found), found.updates)
            self.step = found.step
        self._mark("resume")
        self.writer = checkpoint.Writer(self.run_folder, config.checkpoint, rank, workers, attempt, self._committed)
        self.pending: list[tuple[int, float, Any]] = []
        self.lines: list[dict[str, Any]] = []  # not yet told
        self.told_at = -math.inf
        self.answer: Any = None  # of the supervisor to the newest lines: whether to stop
        self.stopping = False
        self.window = (self.step, time.monotonic())

    def _import(self) -> None:
        """The slow imports, so that their time has a name."""
        import deepspeed  # noqa: F401
        import transformers  # noqa: F401

    def run(self) -> None:
        """All steps that are left, then the last checkpoint and the export."""
        try:
            self._run()
        finally:
            self._report()

    def _run(self) -> None:
        from train import state

        config = self.config
        if self.rank == 0:
            self._tell("began", self.step, self.steps, self.workers, dict(self._seconds()))
        first = self.step
        self.window = (self.step, time.monotonic())
        parts = self._parts(self.step)
        counts = self._sum(self._counts(parts))
        while self.step < self.steps:
            rate = learning_rate(config.optimizer, self.step, self.steps)
            state.set_learning_rate(self.engine, rate)
            parts, counts = self._one_step(parts, counts, rate)
            self.step += 1
            if self.step == first + 1:
                self._mark("first_step")
                if self.rank == 0:
                    self._tell("timed", dict(self._seconds()))
            self.writer.check()
            last = self.step == self.steps
            due = last or self.step % config.checkpoint.every_steps == 0
            measure = self.validation is not None and (last or self.step % config.validate_every == 0)
            if due or measure or self.step % LOG_EVERY[config.scale.device] == 0:
                self._log()
            if due or measure:
                self._report()
            if self.stopping:
                # All workers have seen it at the same step.
                self.writer.wait()
                return
            if measure:
                self._validate()
            if due:
                self._save()
        self.writer.wait()
        if self.rank == 0:
            self._export()

    def _parts(self, step: int) -> list[dict[str, Any]]:
        """This worker's micro batches of a step; none behind the last step."""
        from train.data import batch_indices, share

        if step >= self.steps:
            return []
        indices = batch_indices(len(self.data), self.config.batch_size, self.config.data.seed, step)
        return self.objective.parts(self.data.batch(share(indices, self.rank, self.workers)), self.micro)

    def _counts(self, parts: list[dict[str, Any]]) -> torch.Tensor:
        """Of these micro batches: what the loss is a sum over, and tokens."""
        import torch

        counted = [self.objective.counts(part) for part in parts]
        totals = [float(sum(terms for terms, _ in counted)), float(sum(tokens for _, tokens in counted))]
        return torch.tensor(totals, device=self.device, dtype=torch.float64)

    def _one_step(
        self, parts: list[dict[str, Any]], counts: torch.Tensor, rate: float
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Forward and backward of this worker's part of a batch, in micro batches, and the optimizer's step.

        Args:
            parts: The micro batches.
            counts: `_counts` of all workers' parts of this step.
            rate: Learning rate.

        Returns:
            Parts and counts of the next step, whose counts are summed over the workers together with this step's losses.
        """
        import torch

        # DeepSpeed averages gradients over the workers; what is wanted is their sum, over one denominator.
        scale = self.workers / counts[0].clamp(min=1.0)
        if self.config.lora is not None and self.config.lora.dropout:
            torch.manual_seed(hash((self.config.seed, self.step, self.rank)) % 2**63)
        total = torch.zeros(2, device=self.device, dtype=torch.float64)
        for part in parts:
            summed, right = self.objective.loss(self.engine, part)
            self.engine.backward(summed * scale, scale_wrt_gas=False)
            self.engine.step()
            total += torch.stack([summed.detach().double(), right.detach().double()])
        norm = self.engine.get_global_grad_norm()
        norm = torch.as_tensor(norm if norm is not None else math.nan, device=self.device, dtype=torch.float64)
        following = self._parts(self.step + 1)
        stop = torch.full((1,), self._asked_to_stop(), device=self.device, dtype=torch.float64)
        together = self._sum(torch.cat([total, stop, self._counts(following)]))
        self.pending.append((self.step + 1, rate, torch.cat([together[:3], counts, norm.reshape(1)])))
        return following, together[3:]

    def _validate(self) -> None:
        """Mean loss over all validation sequences; every worker does as many forward passes as the others."""
        import numpy as np
        import torch

        assert self.validation is not None
        count = len(self.validation)
        rounds = math.ceil(count / (self.workers * self.micro))
        total = torch.zeros(2, device=self.device, dtype=torch.float64)
        self.engine.eval()
        with torch.no_grad():
            for number in range(rounds):
                start = (number * self.workers + self.rank) * self.micro
                wanted = np.arange(start, start + self.micro)
                arrays = self.validation.batch(np.minimum(wanted, count - 1))
                for name, array in arrays.items():
                    if name.endswith("labels"):
                        array[wanted >= count] = losses.IGNORED
                (part,) = self.objective.parts(arrays, self.micro)
                summed, _ = self.objective.loss(self.engine, part)
                terms = torch.tensor(self.objective.counts(part)[0], device=self.device, dtype=torch.float64)
                total += torch.stack([summed.double(), terms])
        self.engine.train()
        summed, weight = self._sum(total).tolist()
        loss = summed / max(1.0, weight)
        self._number(loss, self.step, "validation loss")
        self.last_validation = (self.step, loss)
        if self.rank == 0:
            self._tell("measured", self.step, loss)

    def _log(self) -> None:
        """Fetch what the steps since the last log gave, check it, and tell it, unless something was told just now."""
        import torch

        if not self.pending:
            return
        rows = torch.stack([row for _, _, row in self.pending]).tolist()
        since, at = self.window
        now = time.monotonic()
        each_s = (now - at) / max(1, self.step - since)
        self.window = (self.step, now)
        for (step, rate, _), (summed, right, stop, terms, tokens, norm) in zip(self.pending, rows, strict=True):
            self.stopping = self.stopping or stop > 0
            loss = summed / max(1.0, terms)
            self._number(loss, step, "loss")
            if self.config.precision != "fp16" and not math.isnan(norm):  # fp16 skips such a step by itself
                self._number(norm, step, "gradient norm")
            line = {
                "step": step, "epoch": round(step * self.config.batch_size / len(self.data), 4), "loss": loss, "lr": rate,
                "grad_norm": None if math.isnan(norm) else norm, "tokens_per_s": tokens / each_s, "terms": int(terms),
                "step_s": each_s, "workers": self.workers,
            }  # fmt: skip
            if self.config.objective == "dpo":
                line["accuracy"] = right / max(1.0, terms)
            self.lines.append(line)
        self.last_loss = loss
        self.pending.clear()
        if now - self.told_at >= TELL_S:
            self._report()

    def _report(self) -> None:
        """Tell the lines that are not told yet."""
        lines, self.lines = self.lines, []
        if lines and self.rank == 0:
            self.answer = told(self.task.supervisor, "tell", lines)
            self.told_at = time.monotonic()

    def _asked_to_stop(self) -> float:
        """1 on worker 0 when the supervisor said so; summed with the losses, so that it costs no look of its own."""
        import ray

        if self.answer is None or not ray.wait([self.answer], timeout=0)[0]:
            return 0.0
        answer, self.answer = ray.get(self.answer), None
        return float(answer)

    def _number(self, value: float, step: int, name: str) -> None:
        """Raise when a loss is no number. It is summed over the workers, so all of them see it."""
        if not math.isfinite(value):
            raise TrainError(
                f"the {name} of step {step} is {value}; lower train.optimizer.learning_rate, set train.optimizer.clip, or use "
                "precision bf16; the last checkpoint is from before it"
            )

    def _save(self) -> None:
        from train import checkpoint, state

        measured = self.last_validation
        made = checkpoint.Checkpoint(
            step=self.step,
            updates=state.get_updates(self.engine),
            workers=self.workers,
            model=self.identity,
            loss=self.last_loss,
            validation_loss=measured[1] if measured and measured[0] == self.step else None,
        )
        self.writer.save(made, state.gather(self.engine, self.rank, self.workers))
        # The time a save takes is no part of the speed of training.
        self.window = (self.step, time.monotonic())

    def _export(self) -> None:
        from train import checkpoint, export

        newest = checkpoint.latest(self.run_folder)
        assert newest is not None
        export.write(self.config, self.base, self.run_folder, newest, self.run_folder.below(export.FOLDER))

    def _committed(self, made: Any) -> None:
        self._tell("saved", replace(made, files=()))

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """Over all workers; nothing to do for one."""
        import torch.distributed as distributed

        if self.workers > 1:
            distributed.all_reduce(value)
        return value

    def _same(self, value: Any) -> Any:
        """Worker 0's value, for all."""
        import torch.distributed as distributed

        if self.workers == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def _tell(self, what: str, *values: Any) -> None:
        told(self.task.supervisor, what, *values)

    def _mark(self, name: str) -> None:
        self.marks.append((name, time.monotonic()))

    def _seconds(self) -> list[tuple[str, float]]:
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [(name, round(at - before, 3)) for (_, before), (name, at) in pairs]
