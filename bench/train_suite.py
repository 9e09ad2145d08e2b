"""`python -m bench train`: our training loop beside DeepSpeed's own launcher and a plain PyTorch loop, in interleaved rounds.

All arms do the same steps on the same sequences with the same model, optimizer and precision; the number of threads together is
the same but for the arm with fewer workers, which shows how speed grows with them. Speed is that of the steps after a warm-up.
It returns one document: where and how, every round, medians, scaling, model FLOPs, targets. Called by `bench.__main__`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import rounds, suites, targets, train_arms, train_figures
from cluster.config import load
from cluster.errors import ConfigError

STEPS = {"quick": (24, 4), "full": (80, 10)}
"""Steps of a run, and how many of them are warm-up."""
PAIRS = {"quick": 2, "full": 5}


@dataclass(frozen=True)
class TrainSuitePlan:
    """What to compare: the configuration and its overrides, rounds of each arm, numbers of workers, steps, a GPU's peak."""

    config: Path
    overrides: tuple[str, ...]
    pairs: int | None
    workers: tuple[int, ...]
    quick: bool
    steps: int | None = None
    peak_tflops: float | None = None


def bench_of(plan: TrainSuitePlan) -> train_arms.Bench:
    """The comparison that a plan asks for.

    Raises:
        ConfigError: the configuration trains something the baselines do not do, or its batch does not divide.
    """
    config = load(plan.config, list(plan.overrides))
    train = config.train
    if train is None:
        raise ConfigError(f"{plan.config}: has no section 'train'")
    if train.objective == "dpo" or train.lora is not None:
        raise ConfigError(f"{plan.config}: bench train measures sft and pretrain of all weights; leave out lora and dpo")
    most = max(plan.workers)
    for workers in plan.workers:
        if train.batch_size % workers:
            raise ConfigError(f"--workers {workers}: train.batch_size {train.batch_size} cannot be divided among them")
    micro = train.micro_batch_size or train.batch_size // most
    for workers in plan.workers:
        if train.batch_size // workers % micro:
            raise ConfigError(f"--workers {workers}: train.micro_batch_size {micro} does not divide what each of them does")
    steps, warmup = STEPS["quick" if plan.quick else "full"]
    work = (Path(config.run_dir) / "bench" / "train").absolute()
    return train_arms.Bench(
        config=plan.config.absolute(),
        overrides=plan.overrides,
        train=train,
        work=work,
        workers=plan.workers,
        steps=plan.steps or steps,
        warmup=min(warmup, (plan.steps or steps) // 2),
        micro=micro,
        threads=train.scale.threads_per_worker or max(1, len(os.sched_getaffinity(0)) // most),
    )


def run(plan: TrainSuitePlan, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole comparison."""
    bench = bench_of(plan)
    pairs = plan.pairs or PAIRS["quick" if plan.quick else "full"]
    train = bench.train
    document = suites.describe("train", {
        "config": str(plan.config), "set": list(plan.overrides), "pairs": pairs, "quick": plan.quick,
        "workers": list(plan.workers), "steps": bench.steps, "warmup": bench.warmup,
        "threads_per_worker": bench.threads, "micro_batch_size": bench.micro,
    })  # fmt: skip
    document["work"] = {
        "base": train.base, "objective": train.objective, "batch_size": train.batch_size, "max_length": train.data.max_length,
        "precision": train.precision, "zero_stage": train.zero.stage, "device": train.scale.device,
        "clip": train.optimizer.clip, "activation_checkpointing": train.activation_checkpointing,
    }  # fmt: skip
    shutil.rmtree(bench.work, ignore_errors=True)
    bench.work.mkdir(parents=True)
    say("a short run first: it prepares the data and fills caches")
    made = train_arms.prepare(bench)
    document["deepspeed"] = made.deepspeed
    arms = train_arms.names(plan.workers)
    found = []
    # Round 0 of `order` is a warm-up, which the short run was.
    for number, arm in rounds.order(arms, pairs):
        if number:
            found.append(train_arms.measure(bench, made, arm, number))
            say(progress(found[-1]))
    document |= conclude(bench, found, arms, document["hardware"]["gpus"], plan.peak_tflops)
    shutil.rmtree(bench.work, ignore_errors=True)
    return document


def conclude(
    bench: train_arms.Bench, found: list[dict[str, Any]], arms: tuple[str, ...], gpus: list[str], peak: float | None
) -> dict[str, Any]:
    """Medians, scaling, FLOPs and targets of the rounds."""
    train, most = bench.train, bench.most
    model = next(r["model"] for r in found if "model" in r)
    flops = train_figures.flops_per_token(model, train.data.max_length)
    if train.scale.device == "gpu":
        peak = peak or train_figures.peak_tflops(gpus, train.precision)
        for r in found:
            count = int(r["arm"].partition("-")[2] or 1)
            r["mfu"] = train_figures.mfu(r["tokens_per_s"], flops, count, peak)
    medians = train_figures.medians(found, arms)
    efficiency = train_figures.scaling(medians, min(bench.workers), most)
    ratio = medians[f"ours-{most}"]["ratios"][f"deepspeed-{most}"].get("tokens_per_s")
    same = train_figures.same_first_loss(found)
    return {
        "model": model,
        "flops": {
            "per_token": flops,
            "formula": train_figures.FORMULA,
            "peak_tflops": peak,
            "sequence_length": train.data.max_length,
        },
        "medians": medians,
        "scaling": {"from": min(bench.workers), "to": most, "efficiency": efficiency},
        "same_first_loss": same,
        "targets": targets.train(most, ratio["median"] if ratio else None, same),
        "rounds": found,
    }


def progress(result: dict[str, Any]) -> str:
    """One line for the person who waits."""
    line = f"round {result['round']}  {result['arm']:<12} {result['tokens_per_s']:>9,.0f} tokens/s  "
    line += (
        f"step {result['step_ms_p50']:.0f} ms  {result['memory_mib']:,.0f} MiB  first step after {result['first_step_s']:.1f} s"
    )
    return line + f"  first loss {result['first_loss']:.4f}"
