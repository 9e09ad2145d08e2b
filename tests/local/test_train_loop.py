"""The training loop on two real DeepSpeed workers, without Ray: every ZeRO stage against plain PyTorch, and resumes.

Tolerances: fp32 losses agree to 1e-4 of their value (sums in another order; seen here: 1e-6), bf16 ones to 2e-2
(its numbers have 8 bits, 4e-3 each, and processors multiply them in another order; seen: 3e-3 and, elsewhere, 9e-3).
"""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from train_workers import run_workers, section, write_dialogues

from cluster.train_config import TrainConfig
from train import checkpoint, models
from train.data import Sequences, batch_indices
from train.schedule import learning_rate
from train.storage import Storage

STAGES = (0, 1, 2, 3)
Lines = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def plan(folder) -> dict[str, dict[str, Any]]:
    """Runs on two workers."""
    chats = write_dialogues(folder / "chats.jsonl")
    choices = write_dialogues(folder / "choices.jsonl", preferences=True)
    out = folder / "out"
    pairs = {"objective": "dpo", "data": {"train": [choices], "packing": False}, "max_steps": 4}
    runs = [section(f"zero{stage}", out, chats, zero={"stage": stage}) for stage in STAGES]
    runs += [
        section("half", out, chats, precision="bf16", data={"validation": [chats]}, validate_every=3),
        section(
            "thrifty",
            out,
            chats,
            zero={"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
            micro_batch_size=1,
            activation_checkpointing=True,
        ),
        section("adapter", out, chats, lora={"rank": 4}, zero={"stage": 2}),
        section("preference", out, choices, **pairs),
        section("preference-adapter", out, choices, lora={"rank": 4, "targets": "attention"}, **pairs),
    ]
    return {run["name"]: run for run in runs}


@pytest.fixture(scope="module")
def lines(plan, folder) -> Lines:
    return dict(zip(plan, run_workers(list(plan.values()), 2, folder), strict=True))


def losses_of(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def plain(section: dict[str, Any]) -> list[float]:
    """The same run in plain PyTorch, each dialogue alone: no packing, no DeepSpeed, none of our loss code."""
    config = TrainConfig.model_validate(section)
    model = models.build(config, models.base_folder(config.base))
    run = Storage.open(config.output).below(config.name)
    data = Sequences.open(run, f"data/{run.list('data')[0]}")
    wanted = config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), 1.0, wanted.betas, wanted.eps, wanted.weight_decay)
    found = []
    assert config.max_steps is not None
    for step in range(config.max_steps):
        arrays = data.batch(batch_indices(len(data), config.batch_size, config.data.seed, step))
        terms, count = [], 0
        for tokens, labels, positions in zip(*(arrays[name] for name in ("input_ids", "labels", "position_ids")), strict=True):
            starts = [*(positions == 0).nonzero()[0], len(tokens)]
            for begin, end in itertools.pairwise(starts):
                target = torch.from_numpy(labels[begin:end])[1:]
                if end - begin < 2 or (target == -100).all():
                    continue
                logits = model(input_ids=torch.from_numpy(tokens[begin:end])[None]).logits[0, :-1]
                terms.append(functional.cross_entropy(logits, target, reduction="sum"))
                count += int((target != -100).sum())
        loss = torch.stack(terms).sum() / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), wanted.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(wanted, step, config.max_steps)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def expected(plan, lines) -> list[float]:
    return plain(plan["zero0"])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_on_two_workers_follows_plain_pytorch(stage, lines, expected):
    assert losses_of(lines[f"zero{stage}"]) == pytest.approx(expected, rel=1e-4)


def test_offload_accumulation_and_recomputed_activations_change_nothing(lines, expected):
    assert losses_of(lines["thrifty"]) == pytest.approx(expected, rel=1e-4)


def test_bf16_stays_close_and_validation_is_measured(lines, expected):
    assert losses_of(lines["half"]) == pytest.approx(expected, rel=2e-2)
    measured = {line["step"]: line["validation_loss"] for line in lines["half"] if "validation_loss" in line}
    assert measured.keys() == {3, 6} and measured[6] < measured[3] < lines["half"][0]["loss"]


def test_every_step_is_told_with_what_it_was(lines):
    for number, line in enumerate(lines["zero1"], start=1):
        assert line["step"] == number and line["workers"] == 2 and line["tokens_per_s"] > 0 and line["grad_norm"] > 0
    assert len(lines["zero1"]) == 6


def test_the_export_is_the_trained_model(plan, lines, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = folder / "out" / "zero3" / "export"
    run = Storage.open(str(folder / "out" / "zero3"))
    newest = checkpoint.latest(run)
    assert newest is not None
    weights = {name.removeprefix("weight:"): value for name, value in checkpoint.read(run, newest) if name.startswith("weight:")}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_an_adapter_learns_and_is_exported_as_peft_takes_it(lines, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = losses_of(lines["adapter"])
    assert found[-1] < found[0]
    out = folder / "out" / "adapter" / "export"
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    base = AutoModelForCausalLM.from_pretrained(models.base_folder("scratch:chat"))
    adapted = PeftModel.from_pretrained(base, out)
    assert any(tensor.abs().sum() > 0 for name, tensor in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("name", ["preference", "preference-adapter"])
def test_preferences_start_at_log_2_and_are_learned(name, lines):
    found = lines[name]
    assert found[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert found[-1]["loss"] < found[0]["loss"] and found[-1]["accuracy"] > 0.5


def cut(folder: Path, source: str, target: str, step: int) -> None:
    """A copy of a run as if it had been killed after the checkpoint of `step`."""
    home = folder / "out" / target
    shutil.copytree(folder / "out" / source, home)
    for path in (home / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def test_two_then_one_then_two_workers_and_another_stage_each_time(plan, lines, folder):
    straight = losses_of(lines["zero2"])
    moved = {"half-way": (2, 3), "home": (4, 1)}  # name: (step, stage)
    cut(folder, "zero2", "half-way", 2)
    cut(folder, "half", "half-alone", 2)
    cut(folder, "adapter", "adapter-alone", 2)
    alone = [
        {**plan["zero2"], "name": "half-way", "zero": {"stage": moved["half-way"][1]}},
        {**plan["half"], "name": "half-alone", "zero": {"stage": 3}},
        {**plan["adapter"], "name": "adapter-alone", "zero": {"stage": 0}},
    ]
    one, bf16, adapter = run_workers(alone, 1, folder)
    assert [line["step"] for line in one] == [3, 4, 5, 6] and {line["workers"] for line in one} == {1}
    assert losses_of(one) == pytest.approx(straight[2:], rel=1e-4)
    assert losses_of(bf16) == pytest.approx(losses_of(lines["half"])[2:], rel=5e-3)
    assert losses_of(adapter) == pytest.approx(losses_of(lines["adapter"])[2:], rel=1e-4)
    cut(folder, "half-way", "home", 4)
    (two,) = run_workers([{**plan["zero2"], "name": "home", "zero": {"stage": moved["home"][1]}}], 2, folder)
    assert losses_of(two) == pytest.approx(straight[4:], rel=1e-4)
