"""The search space: from paths and values to whole training configurations.

`check` refuses a space before anything is started, `defaults` reads the file's own values, `apply` makes the configuration of one
trial, `draw` values for a population. It knows neither Ray nor Optuna (that is `train.suggest`). Called by `train.tune`.

A path names a field below `train`, as in a configuration file: `optimizer.learning_rate`, `lora.rank`, `batch_size`.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from cluster.errors import ConfigError
from cluster.train_config import SearchRange, TrainConfig, TuneConfig

Values = dict[str, Any]

# What names, stores, prices or measures a run is no choice of a search; how long it trains is the scheduler's.
FIXED = ("name", "output", "price", "checkpoint", "validate_every", "data.validation", "data.prepared")
BUDGET = ("epochs", "max_steps")
# A member of a population goes on from another's weights and optimizer state: only what does not change their shape may differ.
POPULATION = ("optimizer.", "dpo_beta", "lora.dropout", "lora.alpha", "data.seed")
COMBINATIONS = 256


def check(tune: TuneConfig, train: TrainConfig) -> None:
    """Refuse a space that cannot be searched.

    Raises:
        ConfigError: one line per mistake, each with its path: no such field, a value that the schema refuses, a field that this
            scheduler cannot search, no validation rows to compare trials by.
    """
    wrong = [] if train.data.validation else ["train.data.validation: a search compares validation losses; name rows for it"]
    for path, values in tune.space.items():
        found = _field_mistake(path, train) or _scheduler_mistake(path, tune)
        if found:
            wrong.append(f"tune.space.{path}: {found}")
        else:
            wrong += [f"tune.space.{path}: {text}" for text in _value_mistakes(path, values, train)]
    if not wrong:
        wrong = list(_combination_mistakes(tune, train))
    if wrong:
        raise ConfigError("\n".join(wrong))


def apply(train: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration with `values` put in at their paths.

    Raises:
        ConfigError: the schema refuses a value, or the values together; the text names the path.
    """
    data = train.model_dump()
    for path, value in values.items():
        *parents, last = path.split(".")
        spot = data
        for part in parents:
            spot = spot[part]
        spot[last] = value
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, values))) from error


def defaults(train: TrainConfig, space: Mapping[str, SearchRange]) -> Values:
    """The file's own values of the searched fields."""
    data = train.model_dump(mode="json")
    return {path: _at(data, path) for path in space}


def contains(space: Mapping[str, SearchRange], values: Mapping[str, Any]) -> bool:
    """Whether every value is one that the space can give."""
    for path, span in space.items():
        value = values[path]
        if span.choice:
            if not any(same(value, choice) for choice in span.choice):
                return False
        elif isinstance(value, bool) or not isinstance(value, int | float) or not low(span) <= value <= high(span):
            return False
    return True


def draw(space: Mapping[str, SearchRange], chance: random.Random) -> Values:
    """Values by chance: each choice alike, a range evenly or, with `log`, evenly in its logarithm."""
    return {path: _draw(span, chance) for path, span in space.items()}


def clamp(space: Mapping[str, SearchRange], values: Mapping[str, Any]) -> Values:
    """The values, moved into their ranges; choices and names outside the space stay."""
    moved = dict(values)
    for path, span in space.items():
        if not span.choice and path in moved:
            inside = min(max(moved[path], low(span)), high(span))
            moved[path] = round(inside) if span.integer else inside
    return moved


def low(span: SearchRange) -> float:
    """Lowest value of a range."""
    assert span.low is not None
    return span.low


def high(span: SearchRange) -> float:
    """Highest value of a range."""
    assert span.high is not None
    return span.high


def short(values: Mapping[str, Any]) -> str:
    """`learning_rate=0.003 rank=8`, for a line on a screen."""
    return " ".join(f"{path.rpartition('.')[2]}={number(value)}" for path, value in values.items())


def number(value: Any) -> str:
    """A value as a person writes it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data[part]
    return data


def same(one: Any, other: Any) -> bool:
    """Whether a value read from a JSON file is a choice of the space."""
    plain = list(other) if isinstance(other, tuple) else other
    return type(one) is type(plain) and bool(one == plain)


def _draw(span: SearchRange, chance: random.Random) -> Any:
    if span.choice:
        return chance.choice(span.choice)
    if span.log:
        value = math.exp(chance.uniform(math.log(low(span)), math.log(high(span))))
    else:
        value = chance.uniform(low(span), high(span))
    return round(value) if span.integer else value


def _candidates(span: SearchRange) -> list[Any]:
    """The values that are tried on the schema: all choices, or both ends and one between them."""
    if span.choice:
        return list(span.choice)
    if span.integer:
        return [round(low(span)), round(high(span))]
    return [low(span), low(span) + 0.382 * (high(span) - low(span)), high(span)]


def _sections(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one (`X` or `X | None`)."""
    kind = model.model_fields[name].annotation
    kinds = (kind, *get_args(kind))
    return next((part for part in kinds if isinstance(part, type) and issubclass(part, BaseModel)), None)


def paths(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Every path that a search may name."""
    for name in model.model_fields:
        inner = _sections(model, name)
        if inner is not None:
            yield from paths(inner, f"{prefix}{name}.")
        elif not (prefix + name).startswith(FIXED):
            yield prefix + name


def _field_mistake(path: str, train: TrainConfig) -> str | None:
    if path.startswith("train."):
        return f"paths start below `train`; write {path.removeprefix('train.')}"
    if path.split(".")[0] in FIXED or path in FIXED:
        return "is not a choice of a search"
    known = list(paths())
    if path in known:
        data = train.model_dump()
        for part in path.split(".")[:-1]:
            data = data[part]
            if data is None:
                return f"`{part}` is not in train; write it there, then it can be searched"
        return None
    near = difflib.get_close_matches(path, known, n=1) or [name for name in known if name.endswith("." + path)]
    if any(name.startswith(path + ".") for name in known):
        return f"is a section; search one of its fields, such as {next(name for name in known if name.startswith(path + '.'))}"
    return "no such field below `train`" + (f"; did you mean {near[0]}?" if near else "")


def _scheduler_mistake(path: str, tune: TuneConfig) -> str | None:
    if path in BUDGET and tune.scheduler != "none":
        return f"how long a trial trains is decided by scheduler {tune.scheduler}; take it out, or write scheduler: none"
    if tune.scheduler == "pbt" and not path.startswith(POPULATION):
        return "scheduler pbt changes a run on its way, which this field does not allow; it can search " + ", ".join(
            f"{name}*" if name.endswith(".") else name for name in POPULATION
        )
    return None


def _value_mistakes(path: str, span: SearchRange, train: TrainConfig) -> Iterator[str]:
    """Values that the field itself refuses; what only does not fit another field is `_combination_mistakes`."""
    place = tuple(path.split("."))
    for value in _candidates(span):
        try:
            apply(train, {path: value})
        except ConfigError as error:
            assert isinstance(error.__cause__, ValidationError)
            for item in error.__cause__.errors(include_url=False):
                if tuple(str(part) for part in item["loc"][: len(place)]) == place:
                    hint = "; write integer: true" if item["type"] == "int_from_float" and not span.choice else ""
                    yield f"value {number(value)}: {_text(item)}{hint}"
                    break


def _combination_mistakes(tune: TuneConfig, train: TrainConfig) -> Iterator[str]:
    """Values that fit no combination of the others."""
    names = list(tune.space)
    columns = [_candidates(span) for span in tune.space.values()]
    good: list[set[int]] = [set() for _ in names]
    reason: dict[tuple[int, int], str] = {}
    for picks in itertools.islice(itertools.product(*(range(len(column)) for column in columns)), COMBINATIONS):
        try:
            apply(train, {name: column[pick] for name, column, pick in zip(names, columns, picks, strict=True)})
        except ConfigError as error:
            for spot, pick in enumerate(picks):
                reason.setdefault((spot, pick), str(error).partition(": ")[2] or str(error))
        else:
            for spot, pick in enumerate(picks):
                good[spot].add(pick)
    for (spot, pick), text in reason.items():
        if pick not in good[spot]:
            yield f"tune.space.{names[spot]}: value {number(columns[spot][pick])}: {text}"


def _text(item: Any) -> str:
    text: str = item["msg"]
    return text.removeprefix("Value error, ")


def _lines(error: ValidationError, values: Mapping[str, Any]) -> Iterator[str]:
    for item in error.errors(include_url=False):
        spot = ".".join(str(part) for part in item["loc"])
        owner = next((path for path in values if spot.startswith(path)), "")
        said = f"{owner} = {number(values[owner])}" if owner else short(values)
        yield f"{said}: {_text(item)}"
