"""DeepSpeed's JSON and the learning rate, from configurations alone."""

import pytest

from cluster.config import parse
from cluster.errors import ConfigError, TrainError
from cluster.train_config import OptimizerConfig, TrainConfig
from train.schedule import learning_rate
from train.zero import deepspeed_config, micro_batches

NVME = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": "/nvme"}


def config(**changes) -> TrainConfig:
    train = {"name": "t", "base": "scratch:chat", "data": {"train": ["x.jsonl"]}, **changes}
    found = parse({"train": train}).train
    assert found is not None
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_batch_and_clipping_are_what_the_file_says(stage):
    made = deepspeed_config(config(zero={"stage": stage}, batch_size=24, micro_batch_size=2), 4, 100)
    assert made["zero_optimization"]["stage"] == stage
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (24, 2, 3)
    assert made["gradient_clipping"] == 1.0
    assert made["optimizer"]["type"] == "AdamW" and made["optimizer"]["params"]["torch_adam"]


def test_without_a_micro_batch_size_a_worker_does_its_share_at_once():
    assert micro_batches(config(batch_size=8), 2) == (4, 1)


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        ("fp32", 0, {}),
        ("fp32", 3, {}),
        ("bf16", 1, {"bf16": {"enabled": True}}),
        ("fp16", 2, {"fp16": {"enabled": True}}),
        ("bf16", 0, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        ("fp16", 0, {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
    ],
)
def test_precision(precision, stage, expected):
    made = deepspeed_config(config(precision=precision, zero={"stage": stage}), 1, 10)
    assert {key: made[key] for key in ("bf16", "fp16", "torch_autocast") if key in made} == expected


def test_offload_to_cpu_uses_deepspeeds_adam_on_gpu_machines_and_torchs_on_others():
    zero = {"stage": 2, "offload_optimizer": "cpu"}
    on_gpu = deepspeed_config(config(zero=zero), 1, 10)
    assert on_gpu["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "torch_adam" not in on_gpu["optimizer"]["params"]
    on_cpu = deepspeed_config(config(zero=zero, scale={"device": "cpu"}), 1, 10)
    assert on_cpu["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert on_cpu["optimizer"]["params"]["torch_adam"] and on_cpu["zero_force_ds_cpu_optimizer"] is False


def test_offload_to_nvme_names_the_folder():
    made = deepspeed_config(config(zero={"stage": 3, **NVME}), 1, 10)["zero_optimization"]
    assert made["offload_optimizer"]["nvme_path"] == made["offload_param"]["nvme_path"] == "/nvme"


def test_overrides_are_merged_deeply():
    made = deepspeed_config(
        config(
            zero={"stage": 2}, deepspeed_overrides={"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
        ),
        1,
        10,
    )
    assert made["zero_optimization"]["reduce_bucket_size"] == 7 and made["zero_optimization"]["stage"] == 2
    assert made["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"train_batch_size": 4}, "batch_size"),
        ({"zero_optimization": {"stage": 3}}, "zero.stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero.offload_optimizer"),
        ({"bf16": {"enabled": False}}, "precision"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "optimizer.schedule"),
    ],
)
def test_an_override_that_contradicts_is_refused_by_name(overrides, field):
    with pytest.raises(TrainError, match=rf"set by train\.{field};"):
        deepspeed_config(config(deepspeed_overrides=overrides), 1, 10)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(TrainError, match="batch_size 8 cannot be divided among 3 workers"):
        deepspeed_config(config(batch_size=8), 3, 10)
    with pytest.raises(ConfigError, match="cannot be divided among 3 workers"):
        config(batch_size=8, scale={"workers": [2, 4]})


@pytest.mark.parametrize(
    ("zero", "text"),
    [
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters needs stage 3"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer needs stage 1, 2 or 3"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "nvme needs nvme_path"),
    ],
)
def test_impossible_zero_is_refused_with_its_path(zero, text):
    with pytest.raises(ConfigError, match=rf"train\.zero: {text}"):
        config(zero=zero)


def test_learning_rate_rises_and_falls():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup=0.1, final=0.1)
    rates = [learning_rate(optimizer, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    linear = OptimizerConfig(learning_rate=1.0, warmup=0.0, final=0.0, schedule="linear")
    assert [learning_rate(linear, step, 5) for step in range(5)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    flat = OptimizerConfig(learning_rate=1.0, warmup=0.0, schedule="constant")
    assert {learning_rate(flat, step, 5) for step in range(5)} == {1.0}
    assert learning_rate(optimizer, 0, 1) == 1.0
