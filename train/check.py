"""The dry run of `--check`: reads all rows, writes nothing, and says what a run would be.

It lists bad rows (all are counted, the first 20 named), counts and token lengths, the sequences after packing, steps, and an
estimate of time and cost. The time comes from the run's own metrics when it has any, else from 6 operations per parameter and
token over an assumed speed, and the report says which. Rows go through the same code as in `train.data.prepare`. `python -m
train` is the caller.
"""

from __future__ import annotations

import json
import statistics
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import DataError
from cluster.train_config import ComputePrice, TrainConfig
from train import cost, shards, sources
from train.data import Say, Split, counts, total_steps
from train.dialogues import tokenizer_files
from train.storage import Storage

PERCENTILES = (50, 90, 99, 100)
METRICS = "log/metrics.jsonl"
RECENT_STEPS = 20
# Dense bf16 operations per second as the makers state them, by Ray's names; what training reaches of it.
GPU_SPEED = {
    "T4": 65e12, "A10G": 70e12, "L4": 121e12, "A100": 312e12, "L40S": 362e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
}  # fmt: skip
OTHER_GPU = "A100"
REACHED = 0.35
CPU_SPEED = 40e9  # per logical CPU, fp32; forward and backward of a small model alone reached 69e9 on one core


@dataclass(frozen=True)
class SplitReport:
    """One split. `lengths` are tokens per row at PERCENTILES; `mistakes` are the first of `bad` ones."""

    split: Split
    files: int
    rows: int
    bad: int
    skipped: int
    sequences: int
    tokens: int
    trained_tokens: int
    lengths: tuple[int, ...]
    mistakes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a run would be. `seconds` is of its steps alone, `dollars` the workers' price for as long; `basis` says whence."""

    splits: tuple[SplitReport, ...]
    steps: int
    seconds: float
    dollars: float
    basis: str

    @property
    def bad(self) -> int:
        """Rows that must be put right before the run can start; a dry run with any ends with exit status 2."""
        return sum(split.bad for split in self.splits)


def check(config: TrainConfig, say: Say, folder: Path | None = None) -> Report:
    """Read all rows of a run and say what would come of them.

    Args:
        config: The run.
        say: Takes each line of the report.
        folder: The base model's folder; default: the one `config.base` names.

    Raises:
        DataError: no such files, or no tokenizer. Bad rows raise nothing; see `Report.bad`.
    """
    from train.models import base_folder

    folder = folder or base_folder(config.base)
    splits = [_split(config, "train", folder)]
    if config.data.validation:
        splits.append(_split(config, "validation", folder))
    for split in splits:
        _describe(split, config, say)
    train = splits[0]
    steps = total_steps(train.sequences, config.batch_size, config.epochs, config.max_steps) if train.sequences else 0
    tokens = train.tokens * steps * config.batch_size / train.sequences if steps else 0.0
    seconds, basis = _seconds(config, folder, tokens)
    cpu, gpu = cost.held(config.scale, config.scale.bounds[1], seconds)
    usage = cost.Usage(seconds=seconds, cpu_seconds=cpu, gpu_seconds=gpu)
    report = Report(tuple(splits), steps, seconds, cost.cost(usage, config.price).total, basis)
    if not steps:
        return report
    say(f"steps       {steps:,} of {config.batch_size} sequences")
    price = f"${report.dollars:.2f}" if config.price != ComputePrice() else "unknown (train.price is not set)"
    say(f"estimate    {_duration(seconds)}, cost {price}; {basis}")
    return report


def _split(config: TrainConfig, split: Split, folder: Path) -> SplitReport:
    data = config.data
    files, wrong = _files(data.train if split == "train" else data.validation)
    work = replace(shards.Work.of(data, config.objective), mistakes=None)
    total = shards.Counted(bad=len(wrong), mistakes=wrong)
    if files:
        for counted in counts(sources.groups(files), str(folder), tokenizer_files(folder), work):
            total.add(counted)
    return SplitReport(
        split, len(files), total.rows, total.bad, total.skipped, total.sequences, total.tokens, total.trained_tokens,
        _percentiles(total.lengths), tuple(total.mistakes),
    )  # fmt: skip


def _files(addresses: tuple[str, ...]) -> tuple[list[sources.SourceFile], list[str]]:
    """The files of all addresses that have some, and what is wrong with the others."""
    files: list[sources.SourceFile] = []
    wrong = []
    for address in addresses:
        try:
            files += sources.find((address,))
        except DataError as error:
            wrong.append(str(error))
    return files, wrong


def _describe(split: SplitReport, config: TrainConfig, say: Say) -> None:
    for mistake in split.mistakes:
        say(f"{split.split}: {mistake}")
    if split.bad > len(split.mistakes):
        say(f"{split.split}: and {split.bad - len(split.mistakes):,} more")
    say(f"{split.split:<12}{split.rows:,} rows in {split.files} files, {split.bad:,} bad, {split.skipped:,} too long and skipped")
    if not split.rows:
        return
    names = ("max" if at == 100 else f"p{at}" for at in PERCENTILES)
    lengths = ", ".join(f"{name} {length:,}" for name, length in zip(names, split.lengths, strict=True))
    filled = split.tokens / max(1, split.sequences * config.data.max_length * (2 if config.objective == "dpo" else 1))
    say(f"tokens      {split.tokens:,}, loss on {split.trained_tokens:,}; per row {lengths}")
    say(f"sequences   {split.sequences:,} of {config.data.max_length}, {filled:.0%} full")


def _percentiles(lengths: Counter[int]) -> tuple[int, ...]:
    """Nearest-rank percentiles of counted lengths."""
    total = sum(lengths.values())
    if not total:
        return ()
    result, seen = [], 0
    wanted = list(PERCENTILES)
    for length, rows in sorted(lengths.items()):
        seen += rows
        while wanted and seen * 100 >= wanted[0] * total:
            result.append(length)
            wanted.pop(0)
    return tuple(result)


def _seconds(config: TrainConfig, folder: Path, tokens: float) -> tuple[float, str]:
    """Time of the steps, and what it is taken from."""
    measured = _measured(Storage.open(config.output).below(config.name))
    if measured:
        return tokens / measured, f"from {measured:,.0f} tokens/s that this run measured"
    parameters = count_parameters(folder)
    operations = 8 if config.objective == "dpo" else 6  # the frozen reference adds a forward pass
    workers = config.scale.bounds[1]
    if config.scale.device == "cpu":
        speed = CPU_SPEED * workers * config.scale.cpus_per_worker
        said = f"{CPU_SPEED / 1e9:.0f} GFLOP/s per CPU"
    else:
        name = config.scale.accelerator_type or OTHER_GPU
        known = next((gpu for gpu in sorted(GPU_SPEED, key=len, reverse=True) if gpu in name.upper()), OTHER_GPU)
        speed = GPU_SPEED[known] * REACHED * workers
        said = f"{REACHED:.0%} of a {known}'s {GPU_SPEED[known] / 1e12:.0f} TFLOP/s"
    said = f"assumed {said}, {operations} operations per parameter and token, {parameters:,} parameters"
    return tokens * operations * parameters / speed, said


def _measured(run: Storage) -> float | None:
    """Tokens per second of the run's latest steps, if there are any."""
    if not run.exists(METRICS):
        return None
    lines = run.read_bytes(METRICS).splitlines()[-RECENT_STEPS:]
    speeds = [json.loads(line).get("tokens_per_s") for line in lines if line.strip()]
    return statistics.median(known) if (known := [speed for speed in speeds if speed]) else None


def count_parameters(folder: Path) -> int:
    """Weights in a folder's safetensors files, from their headers alone; else those its configuration describes."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return sum(count for file in files for count in _tensor_sizes(file))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


def _tensor_sizes(file: Path) -> Iterator[int]:
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for side in tensor["shape"]:
                size *= side
            yield size


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
