"""A search space becomes configurations, and what cannot be searched is refused with its path."""

import random

import pytest

from cluster.config import parse
from cluster.errors import ConfigError
from cluster.train_config import TrainConfig, TuneConfig
from train import search_space

TRAIN = {
    "name": "t",
    "base": "scratch:chat",
    "data": {"train": ["a.jsonl"], "validation": ["b.jsonl"]},
    "batch_size": 8,
    "scale": {"device": "cpu", "workers": 2},
    "precision": "fp32",
}


def configs(space: dict, train: dict | None = None, **tune) -> tuple[TuneConfig, TrainConfig]:
    config = parse({"train": TRAIN | (train or {}), "tune": {"space": space, **tune}})
    assert config.tune is not None and config.train is not None
    return config.tune, config.train


def mistake(space: dict, train: dict | None = None, **tune) -> str:
    with pytest.raises(ConfigError) as caught:
        search_space.check(*configs(space, train, **tune))
    return str(caught.value)


def test_values_go_to_their_paths_and_the_rest_stays():
    tune, train = configs({"optimizer.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "batch_size": {"choice": [4, 8]}})
    search_space.check(tune, train)
    made = search_space.apply(train, {"optimizer.learning_rate": 0.003, "batch_size": 4})
    assert (made.optimizer.learning_rate, made.batch_size, made.optimizer.clip) == (0.003, 4, 1.0)
    assert made == train.model_copy(update={"batch_size": 4, "optimizer": made.optimizer})
    assert search_space.defaults(train, tune.space) == {"optimizer.learning_rate": 1e-4, "batch_size": 8}


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"optimizer.lerning_rate": {"choice": [1]}}, 
         "tune.space.optimizer.lerning_rate: no such field below `train`; did you mean optimizer.learning_rate?"),
        ({"learning_rate": {"choice": [1.0]}}, "did you mean optimizer.learning_rate?"),
        ({"train.batch_size": {"choice": [8]}}, "write batch_size"),
        ({"optimizer": {"choice": [1]}}, "tune.space.optimizer: is a section"),
        ({"name": {"choice": ["a"]}}, "tune.space.name: is not a choice"),
        ({"optimizer.learning_rate": {"low": -1, "high": 1}}, "optimizer.learning_rate: value -1: Input should be greater"),
        ({"batch_size": {"low": 2, "high": 9}}, "tune.space.batch_size: value 4.674: Input should be a valid integer"),
        ({"batch_size": {"choice": [8, 7]}}, "tune.space.batch_size: value 7: batch_size 7 cannot be divided among 2 workers"),
        ({"optimizer.schedule": {"choice": ["cosine", "cosin"]}}, "tune.space.optimizer.schedule: value cosin: Input should be"),
        ({"lora.rank": {"choice": [4]}}, "`lora` is not in train"),
        ({"max_steps": {"choice": [4]}}, "is decided by scheduler asha"),
    ],
)  # fmt: skip
def test_mistakes_name_their_path(space, said):
    assert said in mistake(space)


def test_every_mistake_gets_its_line():
    lines = mistake({"nothing": {"choice": [1]}, "batch_size": {"choice": [0]}}).splitlines()
    assert [line.split(":")[0] for line in lines] == ["tune.space.nothing", "tune.space.batch_size"]


def test_integers_are_said_to_be_so():
    assert "write integer: true" in mistake({"batch_size": {"low": 2, "high": 9}})
    tune, train = configs({"optimizer.warmup": {"low": 0, "high": 1}, "lora.rank": {"low": 2, "high": 9, "integer": True}},
                          {"lora": {}})  # fmt: skip
    search_space.check(tune, train)


def test_a_search_needs_validation_rows():
    assert mistake({"batch_size": {"choice": [8]}}, {"data": {"train": ["a"]}}).startswith("train.data.validation: ")


def test_values_that_fit_together_are_not_refused_one_by_one():
    space = {"batch_size": {"choice": [8, 12]}, "micro_batch_size": {"choice": [4, 6]}}
    search_space.check(*configs(space))
    assert "tune.space.micro_batch_size: value 5" in mistake(space | {"micro_batch_size": {"choice": [4, 6, 5]}})


def test_a_population_searches_only_what_can_change_on_the_way():
    search_space.check(*configs({"optimizer.learning_rate": {"low": 0.1, "high": 0.2}}, scheduler="pbt"))
    assert "scheduler pbt" in mistake({"batch_size": {"choice": [8]}}, scheduler="pbt")


def test_draws_are_inside_and_repeat():
    tune, _ = configs({
        "optimizer.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "optimizer.schedule": {"choice": ["cosine", "linear"]},
        "lora.rank": {"low": 2, "high": 9, "integer": True},
    })  # fmt: skip
    drawn = [search_space.draw(tune.space, random.Random(seed)) for seed in range(200)]
    assert all(search_space.contains(tune.space, values) for values in drawn)
    assert {values["lora.rank"] for values in drawn} == set(range(2, 10))
    # Evenly in the logarithm: half of them below the geometric mean.
    assert 70 < sum(values["optimizer.learning_rate"] < 10**-3.5 for values in drawn) < 130
    assert drawn == [search_space.draw(tune.space, random.Random(seed)) for seed in range(200)]
    assert not search_space.contains(tune.space, drawn[0] | {"optimizer.learning_rate": 0.5})
    assert not search_space.contains(tune.space, drawn[0] | {"optimizer.schedule": "constant"})


def test_values_are_moved_into_their_ranges():
    tune, _ = configs({"optimizer.learning_rate": {"low": 0.1, "high": 0.2}})
    assert search_space.clamp(tune.space, {"optimizer.learning_rate": 0.24, "number": 3}) == {
        "optimizer.learning_rate": 0.2, "number": 3,
    }  # fmt: skip
