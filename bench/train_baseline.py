"""What our training loop is measured against: the same model, batches and optimizer without Ray and without any of our code.

`python bench/train_baseline.py PLAN` is the plain PyTorch loop in one process; under DeepSpeed's own launcher the same file is
one of its workers (`RANK` is set then). PLAN is JSON that `train_arms` writes; worker 0 writes its times to the file that PLAN
names. It reads the sequences that a run of ours has prepared, by itself, in the order in which that run takes them, so that the
first loss of every arm is the same. It does what a loop must, in the libraries' usual way, and nothing for comfort: no metrics,
no checkpoint, no validation. Times are taken where ours are: each step on a CPU, each `log_every` steps on a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

# The format of prepared sequences: uint32, an id and two flags.
TRAINED, START, ID, NO_LOSS = 1 << 31, 1 << 30, (1 << 30) - 1, -100


class Batches:
    """A run's prepared sequences as the micro batches of one worker.

    Args:
        plan: Names the folder, seed, batch size and the steps that will be asked for.
        rank: Of this worker.
        workers: Of all.
    """

    def __init__(self, plan: dict[str, Any], rank: int, workers: int) -> None:
        import numpy as np

        folder = Path(plan["data"])
        index = json.loads((folder / "index.json").read_text())
        shards = [np.load(folder / name, mmap_mode="r") for name, _ in index["shards"]]
        self.rows = np.concatenate([shard[:, 0] for shard in shards])
        self.batch, self.rank, self.workers = int(plan["batch_size"]), rank, workers
        epochs = plan["steps"] * self.batch // len(self.rows) + 1
        draws = [
            np.random.Generator(np.random.PCG64([plan["seed"], epoch])).permutation(len(self.rows)) for epoch in range(epochs)
        ]
        self.order = np.concatenate(draws)

    def _arrays(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Ids, labels without first tokens, positions; cut behind the last label. [n, length] each."""
        import numpy as np

        rows = self.rows[places]
        ids = (rows & ID).astype(np.int64)
        starts = (rows & START) > 0
        at = np.arange(rows.shape[1])
        positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
        labels = np.where(((rows & TRAINED) > 0) & (positions > 0), ids, NO_LOSS)
        length = int(self._lengths(labels).max())
        return ids[:, :length], labels[:, :length], positions[:, :length]

    @staticmethod
    def _lengths(labels: NDArray[np.int64]) -> NDArray[np.int64]:
        import numpy as np

        trained = labels != NO_LOSS
        return np.where(trained.any(axis=1), labels.shape[1] - np.argmax(trained[:, ::-1], axis=1), 1)

    def parts(self, step: int, micro: int) -> list[tuple[torch.Tensor, ...]]:
        """This worker's micro batches of a step."""
        import torch

        each = self.batch // self.workers
        first = step * self.batch + self.rank * each
        spots = [self.order[at : at + micro] for at in range(first, first + each, micro)]
        return [tuple(torch.from_numpy(array) for array in self._arrays(spot)) for spot in spots]

    def tokens(self, step: int) -> int:
        """Of the whole batch, up to the last label of each sequence."""
        _, labels, _ = self._arrays(self.order[step * self.batch : (step + 1) * self.batch])
        return int(self._lengths(labels).sum())


def main(path: Path) -> None:
    """Do the steps and, as worker 0, write the times."""
    begun = time.time()
    plan: dict[str, Any] = json.loads(path.read_text())
    rank, workers = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    marks = [("start", time.monotonic())]

    def mark(name: str) -> None:
        marks.append((name, time.monotonic()))

    import torch

    torch.set_num_threads(plan["threads"])
    import transformers  # noqa: F401

    if plan["deepspeed"]:
        import deepspeed  # noqa: F401
    mark("imports")
    batches = Batches(plan, rank, workers)
    mark("data")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if plan["device"] == "gpu" else torch.device("cpu")
    model = _model(plan)
    shape = _shape(model)
    mark("model")
    step = (_deepspeed if plan["deepspeed"] else _plain)(model, plan, device)
    mark("engine")
    step_s: list[float] = []
    first_loss, first_at = 0.0, 0.0
    since, at = 0, time.monotonic()
    for number in range(plan["steps"]):
        loss = step(batches.parts(number, plan["micro_batch_size"]))
        if number and (number + 1) % plan["log_every"] and number + 1 < plan["steps"]:
            continue
        value = float(loss)  # waits for the device
        now = time.monotonic()
        step_s += [(now - at) / (number + 1 - since)] * (number + 1 - since)
        since, at = number + 1, now
        if number == 0:
            mark("first_step")
            first_loss, first_at = value, time.time()
    if rank == 0:
        seconds = {name: after - before for (_, before), (name, after) in itertools.pairwise(marks)}
        result = {
            "step_s": step_s, "tokens": [batches.tokens(number) for number in range(plan["steps"])], "first_loss": first_loss,
            "begun_at": begun, "first_step_at": first_at, "seconds": seconds, "model": shape,
            "gpu_mib": torch.cuda.max_memory_reserved() / 2**20 if plan["device"] == "gpu" else None,
        }  # fmt: skip
        Path(plan["result"]).write_text(json.dumps(result))


def _model(plan: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.float32)
    model.config.use_cache = False
    if plan["activation_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _shape(model: Any) -> dict[str, int]:
    """What the work of a token is computed from. An embedding that is only looked up multiplies nothing."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    tied = bool(getattr(config, "tie_word_embeddings", False))
    looked_up = 0 if tied else model.get_input_embeddings().weight.numel()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "parameters": total, "multiplied": total - looked_up, "layers": config.num_hidden_layers,
        "attention_width": config.num_attention_heads * width,
    }  # fmt: skip


def _loss(model: Any, part: tuple[torch.Tensor, ...], device: torch.device) -> torch.Tensor:
    import torch.nn.functional as functional

    ids, labels, positions = (tensor.to(device, non_blocking=True) for tensor in part)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    shifted = labels[:, 1:]
    wanted = shifted != NO_LOSS
    return functional.cross_entropy(logits[:, :-1][wanted].float(), shifted[wanted])


Step = Callable[[list[tuple[Any, ...]]], Any]


def _plain(model: Any, plan: dict[str, Any], device: torch.device) -> Step:
    """PyTorch alone: AdamW, clipping, autocast for the lower precisions."""
    import torch

    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), **plan["adamw"], fused=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan["precision"])
    scaler = torch.amp.GradScaler(device.type, enabled=plan["precision"] == "fp16")

    def step(parts: list[tuple[Any, ...]]) -> Any:
        total = torch.zeros((), device=device)
        for part in parts:
            with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
                loss = _loss(model, part, device) / len(parts)
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        if plan["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan["clip"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _deepspeed(model: Any, plan: dict[str, Any], device: torch.device) -> Step:
    """DeepSpeed with the JSON that our run gave it, used as its documentation says."""
    import logging

    import deepspeed
    import torch

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # As in our loop: an operation that only inference uses is not compiled for a minute.
        deepspeed.ops.__compatible_ops__ = {}
    else:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", auto_mpi_discovery=False)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=plan["deepspeed"])

    def step(parts: list[tuple[Any, ...]]) -> Any:
        total = torch.zeros((), device=device)
        for part in parts:
            loss = _loss(engine, part, device)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(parts)
        return total

    return step


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
