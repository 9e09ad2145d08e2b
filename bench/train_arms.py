"""The arms of `python -m bench train`: how each is started, watched and read. Called by `train_suite`.

`ours-N` is `python -m train sft` with N workers, read from what the run writes (run.json, metrics.jsonl); `plain` and
`deepspeed-N` run `train_baseline`. All are processes: nothing of the training code is imported here.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import cpu, processes, train_figures
from cluster.errors import LaunchError
from cluster.train_config import SPINS, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
LOOK_S = 0.1
SAMPLE_S = 2.0  # memory is looked at this often: the look itself costs the machine some hundredths of a second
LOG_EVERY = {"cpu": 1, "gpu": 10}  # steps between two looks at the clock, as in our loop


@dataclass(frozen=True)
class Bench:
    """What is the same in all rounds.

    `work` is a scratch folder, `steps` of each run with the first `warmup` not counted, `micro` sequences per forward pass of a
    worker, `threads` of a worker, `workers` the numbers that are compared.
    """

    config: Path
    overrides: tuple[str, ...]
    train: TrainConfig
    work: Path
    workers: tuple[int, ...]
    steps: int
    warmup: int
    micro: int
    threads: int
    timeout_s: float = 900.0

    @property
    def most(self) -> int:
        """The larger number of workers: `plain` gets as many threads, `deepspeed` as many workers."""
        return max(self.workers)


@dataclass(frozen=True)
class Made:
    """What the first run of ours leaves for the baselines: model folder, prepared sequences, DeepSpeed's JSON."""

    model: str
    data: str
    deepspeed: dict[str, Any]


def names(workers: Sequence[int]) -> tuple[str, ...]:
    """The arms in order; neighbours are what is compared most closely."""
    most = max(workers)
    return ("plain", f"deepspeed-{most}", *(f"ours-{count}" for count in sorted(workers, reverse=True)))


def ours_command(bench: Bench, name: str, workers: int, steps: int) -> list[str]:
    """`train sft` with the work of the comparison: nothing but steps until the last one, then one checkpoint and the export."""
    output = bench.work / "ours"
    fields: dict[str, Any] = {
        # No cluster is known in this run directory, so each run pays for its own and ends it.
        "run_dir": bench.work / "none",
        "train.name": name, "train.output": output, "train.max_steps": steps, "train.epochs": 100000,
        "train.micro_batch_size": bench.micro, "train.validate_every": 1000000, "train.data.validation": "[]",
        "train.data.prepared": bench.work / "prepared", "train.checkpoint.every_steps": 1000000,
        "train.scale.workers": workers, "train.scale.threads_per_worker": bench.threads,
    }  # fmt: skip
    sets = [f"--set={override}" for override in (*bench.overrides, *(f"{key}={value}" for key, value in fields.items()))]
    return [sys.executable, "-m", "train", bench.train.objective, str(bench.config), *sets]


def baseline_plan(bench: Bench, made: Made, deepspeed: bool, result: Path) -> dict[str, Any]:
    """What `train_baseline` reads. The plain loop does in one forward pass what the workers do in one each."""
    train = bench.train
    optimizer = train.optimizer
    return {
        "model": made.model, "data": made.data, "result": str(result),
        "seed": train.data.seed, "batch_size": train.batch_size, "steps": bench.steps,
        "micro_batch_size": bench.micro * (1 if deepspeed else bench.most),
        "threads": bench.threads * (1 if deepspeed else bench.most), "device": train.scale.device,
        "precision": train.precision, "clip": optimizer.clip, "activation_checkpointing": train.activation_checkpointing,
        "log_every": LOG_EVERY[train.scale.device],
        "adamw": {
            "lr": optimizer.learning_rate, "betas": list(optimizer.betas), "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
        "deepspeed": made.deepspeed if deepspeed else None,
    }  # fmt: skip


def baseline_command(plan: Path, workers: int | None) -> list[str]:
    """Plain without `workers`; else through DeepSpeed's launcher."""
    script = [str(ROOT / "bench" / "train_baseline.py"), str(plan)]
    if workers is None:
        return [sys.executable, *script]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(workers), "--master_port", str(port), "--no_local_rank"]
    return [sys.executable, *launcher, *script]


def prepare(bench: Bench) -> Made:
    """A short run of ours: the data is prepared, the caches are filled, and the baselines get their inputs.

    It learns nothing, so that its export is what every arm starts from.
    """
    command = [*ours_command(bench, "prepare", bench.most, 2), "--set=train.optimizer.learning_rate=1.0e-30"]
    _watched(bench, "prepare", command, {})
    run = bench.work / "ours" / "prepare"
    book = json.loads((run / "run.json").read_text())
    indexes = list((bench.work / "prepared" / "data").glob("*/index.json"))
    if len(indexes) != 1:
        raise LaunchError(f"{bench.work}: {len(indexes)} prepared data sets where one was expected")
    return Made(str(run / "export"), str(indexes[0].parent), book["attempts"][-1]["deepspeed"])


def measure(bench: Bench, made: Made, arm: str, number: int) -> dict[str, Any]:
    """One round of one arm.

    Returns:
        Speed and step times, `memory_mib` (all its processes, shared pages divided), `largest_process_mib`, `gpu_mib`,
        `first_step_s` from the command, `startup` seconds by cause, `first_loss`, and the arm's name and round.

    Raises:
        LaunchError: it failed, or took too long; with the end of its log.
    """
    kind, _, count = arm.partition("-")
    name = f"{arm}-{number}"
    result = {"arm": arm, "round": number}
    if kind == "ours":
        command = ours_command(bench, name, int(count), bench.steps)
        begun, used = _watched(bench, name, command, {})
        result |= _with_cores(used, read_ours(bench.work / "ours" / name, begun, bench.warmup))
        shutil.rmtree(bench.work / "ours" / name, ignore_errors=True)
        return result
    plan, answer = bench.work / f"{name}.plan.json", bench.work / f"{name}.json"
    plan.write_text(json.dumps(baseline_plan(bench, made, kind == "deepspeed", answer)))
    environ = {"LOCAL_SIZE": count, "DS_ACCELERATOR": "cpu"} if kind == "deepspeed" and bench.train.scale.device == "cpu" else {}
    begun, used = _watched(bench, name, baseline_command(plan, int(count) if count else None), environ)
    return result | _with_cores(used, read_baseline(answer, begun, bench.warmup))


def _with_cores(used: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Peaks and figures of a round, with the cores that its processes kept busy between the first and the last step."""
    samples = used.pop("samples")
    return used | found | {"busy_cores": train_figures.busy_cores(samples, *found.pop("trained"))}


def read_ours(run: Path, begun: float, warmup: int) -> dict[str, Any]:
    """What a run's folder says. `begun` is when its command was started, by the clock of the day."""
    book = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "log" / "metrics.jsonl").read_text().splitlines()]
    attempt, startup = book["attempts"][0], dict(book["startup"])
    tokens = [line["tokens_per_s"] * line["step_s"] for line in lines]
    total = attempt["at"] + startup["first_step"] - begun
    found = train_figures.steady([line["step_s"] for line in lines], tokens, warmup)
    return found | {
        "trained": _span(begun + total, [line["step_s"] for line in lines]),
        "startup": startup | {"other": total - sum(startup.values())}, "first_step_s": total, "first_loss": lines[0]["loss"],
        "attempts": len(book["attempts"]),
    }  # fmt: skip


def read_baseline(answer: Path, begun: float, warmup: int) -> dict[str, Any]:
    """The same from what `train_baseline` wrote."""
    told = json.loads(answer.read_text())
    found = train_figures.steady(told["step_s"], told["tokens"], warmup)
    startup = {"launch": told["begun_at"] - begun, **told["seconds"]}
    return found | {
        "trained": _span(told["first_step_at"], told["step_s"]),
        "startup": startup, "first_step_s": told["first_step_at"] - begun, "first_loss": told["first_loss"],
        "model": told["model"], "attempts": 1,
    }  # fmt: skip


def _span(first_at: float, step_s: Sequence[float]) -> tuple[float, float]:
    """When the first and the last step ended."""
    return first_at, first_at + sum(step_s[1:])


def _watched(bench: Bench, name: str, command: list[str], environ: dict[str, str]) -> tuple[float, dict[str, Any]]:
    """Run a command to its end and look at its memory now and then. Returns when it began, and the peaks."""
    on_gpu = bench.train.scale.device == "gpu"
    idle = gpu_mib() if on_gpu else None
    peaks: dict[str, float | None] = {"memory_mib": 0.0, "largest_process_mib": 0.0, "gpu_mib": None}
    samples: list[tuple[float, dict[str, float]]] = []
    begun = time.time()
    # All arms wait as long as our runs do by themselves: busy waiting takes the cores of those that are waited for.
    environ = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": SPINS, **environ}
    server = processes.start(name, command, bench.work / "logs", environ)
    deadline = due = time.monotonic()
    deadline += bench.timeout_s
    try:
        while server.process.poll() is None:
            if time.monotonic() > deadline:
                raise LaunchError(f"{name} took longer than {bench.timeout_s:.0f} s; {server.log}:\n{server.tail()}")
            if time.monotonic() >= due:
                together, largest, cpu_s = look(server.process.pid)
                samples.append((time.time(), cpu_s))
                seen = {"memory_mib": together, "largest_process_mib": largest}
                if on_gpu and idle is not None:
                    seen["gpu_mib"] = (gpu_mib() or idle) - idle
                peaks |= {key: max(value, peaks[key] or 0.0) for key, value in seen.items()}
                due = time.monotonic() + SAMPLE_S
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(LOOK_S)
    finally:
        processes.stop(server)
    if server.process.returncode:
        raise LaunchError(f"{name} ended with code {server.process.returncode}; {server.log}:\n{server.tail()}")
    return begun, {**peaks, "samples": samples}


def look(root: int, proc: Path = Path("/proc")) -> tuple[float, float, dict[str, float]]:
    """A process and all below it, now.

    Returns:
        MiB of all together (shared pages divided among those that share them), the most MiB that one of them ever had, and CPU
        seconds by who they are.
    """
    together = largest = 0
    cpu_s: dict[str, float] = {}
    table = {process.pid: process for process in cpu.processes(proc)}
    for pid in cpu.descendants([root], table.values()):
        title = title_of(table[pid].cmdline)
        cpu_s[title] = cpu_s.get(title, 0.0) + table[pid].cpu_s
        with contextlib.suppress(OSError):
            together += _kib(proc / str(pid) / "smaps_rollup", "Pss:")
            largest = max(largest, _kib(proc / str(pid) / "status", "VmHWM:"))
    return together / 1024, largest / 1024, cpu_s


def title_of(cmdline: str) -> str:
    """Who a process is: Ray's title, the script or module that Python runs, or the program."""
    words = cmdline.split()
    program = Path(words[0]).name if words else ""
    if not program.startswith("python"):
        return words[0] if program.startswith("ray::") else program
    return Path(next((word for word in words[1:] if not word.startswith("-")), program)).name


def _kib(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name)), 0)


def gpu_mib() -> float | None:
    """Memory in use on all GPUs of the machine; None where that cannot be asked."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return float(sum(map(int, subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split())))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
