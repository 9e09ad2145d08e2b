"""What a run used and what that costs, and the planning formula beside it.

Pure arithmetic, and `write`, which keeps both in a run's `cost.json`. It measures nothing: `train.meter` counts, and `train.tune`
adds up the trials of a search. Prices come from the configuration (`train.price`) and are 0 unless written there.

Units: seconds, bytes (a GB is 10^9 of them, as clouds bill), US dollars; a month has 730 hours.

## The planning formula

    total = compute price * time * (data + model size)

As written its unit is $/h * h * GB, which is no money. It becomes money when time is a pace, the hours that one GB of data and
model takes on the workers that are paid for:

    total [$] = compute price [$/h] * time [h/GB] * (data [GB] + model [GB])

- compute price: all workers of the run together, for an hour: their CPUs * `cpu_hour` + their GPUs * `gpu_hour`.
- time: the pace of the training steps alone, measured by this run or by an earlier, smaller one.
- data: what the steps read, every epoch counted, as prepared sequences. model: the weights in the precision they are trained in.

With the pace of the same run the formula gives the price of its steps, and what the bill has above it is start-up, validation and
checkpoints. For another run it is a rule of thumb: time grows with data * model rather than with their sum, so it holds for a run
of a similar model and is checked by the measured cost that stands next to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from cluster.train_config import ComputePrice, ScaleConfig

GB = 1e9
HOUR = 3600.0
FILE = "cost.json"


class Store(Protocol):
    """The part of `train.storage.Storage` that is needed here."""

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""

    def read_bytes(self, path: str) -> bytes:
        """A whole file."""

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file in one step."""


@dataclass(frozen=True)
class Usage:
    """What a run used. All adds up over the attempts of a resumed run, but `stored_bytes` and `model_bytes`, which are states.

    `seconds` is the time from start to end, `step_seconds` that of the training steps alone. `cpu_seconds` and `gpu_seconds` are
    what was held for the run, busy or not. `bytes_read` is the data, every epoch counted; `checkpoint_bytes` what was written to
    checkpoints and the export, `stored_bytes` what is left of it at the end.
    """

    seconds: float = 0.0
    step_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    bytes_read: int = 0
    checkpoint_bytes: int = 0
    stored_bytes: int = 0
    model_bytes: int = 0

    def __add__(self, later: Usage) -> Usage:
        summed = {field.name: getattr(self, field.name) + getattr(later, field.name) for field in fields(self)}
        return Usage(**summed | {name: getattr(later, name) or getattr(self, name) for name in ("stored_bytes", "model_bytes")})


@dataclass(frozen=True)
class Cost:
    """US dollars. `storage_month` comes again every month that the results are kept, so it is no part of `total`."""

    cpu: float
    gpu: float
    read: float
    storage_month: float

    @property
    def total(self) -> float:
        """What the run cost once."""
        return self.cpu + self.gpu + self.read


@dataclass(frozen=True)
class Plan:
    """The planning formula with its terms; see the module."""

    compute_price_per_hour: float
    hours_per_gb: float
    data_gb: float
    model_gb: float

    @property
    def total(self) -> float:
        """US dollars."""
        return self.compute_price_per_hour * self.hours_per_gb * (self.data_gb + self.model_gb)


def held(scale: ScaleConfig, workers: int, seconds: float) -> tuple[float, float]:
    """CPU-seconds and GPU-seconds of `workers` held for `seconds`; add up the stretches of an elastic run."""
    return workers * scale.cpus_per_worker * seconds, workers * seconds if scale.device == "gpu" else 0.0


def cost(usage: Usage, price: ComputePrice) -> Cost:
    """Dollars of a usage."""
    return Cost(
        cpu=usage.cpu_seconds / HOUR * price.cpu_hour,
        gpu=usage.gpu_seconds / HOUR * price.gpu_hour,
        read=usage.bytes_read / GB * price.read_gb,
        storage_month=usage.stored_bytes / GB * price.storage_gb_month,
    )


def plan(usage: Usage, price: ComputePrice, hours_per_gb: float | None = None) -> Plan:
    """The formula for the workers and sizes of `usage`, at its own pace or at another.

    Args:
        usage: Gives the mean number of CPUs and GPUs held, the data read and the size of the model.
        price: Of the same workers.
        hours_per_gb: Pace to plan with; default: that of the training steps of `usage`.
    """
    size = (usage.bytes_read + usage.model_bytes) / GB
    hours = usage.seconds / HOUR
    once = cost(usage, price)
    pace = hours_per_gb if hours_per_gb is not None else (usage.step_seconds / HOUR / size if size else 0.0)
    return Plan(
        compute_price_per_hour=(once.cpu + once.gpu) / hours if hours else 0.0,
        hours_per_gb=pace,
        data_gb=usage.bytes_read / GB,
        model_gb=usage.model_bytes / GB,
    )


def document(usage: Usage, price: ComputePrice) -> dict[str, Any]:
    """`cost.json` as a mapping: what was used, what it cost, the plan beside it; each number names its unit."""
    measured, planned = cost(usage, price), plan(usage, price)
    return {
        "usage": asdict(usage),
        "price_usd": price.model_dump(),
        "measured_usd": {**asdict(measured), "total": measured.total},
        "plan": {
            "formula": "total_usd = compute_price_usd_per_hour * time_hours_per_gb * (data_gb + model_gb)",
            "compute_price_usd_per_hour": planned.compute_price_per_hour,
            "time_hours_per_gb": planned.hours_per_gb,
            "data_gb": planned.data_gb,
            "model_gb": planned.model_gb,
            "total_usd": planned.total,
        },
        "above_plan_usd": measured.total - planned.total,
    }


def write(into: Store, usage: Usage, price: ComputePrice) -> dict[str, Any]:
    """Write the run's `cost.json` and return the document.

    Args:
        into: The run's folder.
        usage: Of all starts of the run: `read` before the first write, plus this start's.
        price: As configured now.
    """
    made = document(usage, price)
    into.write_bytes(FILE, json.dumps(made, indent=2).encode())
    return made


def read(into: Store) -> Usage:
    """What a run used so far; nothing when it has no `cost.json`."""
    if not into.exists(FILE):
        return Usage()
    return Usage(**json.loads(into.read_bytes(FILE))["usage"])


def lines(usage: Usage, price: ComputePrice) -> list[str]:
    """The bill as a person reads it."""
    made, planned = cost(usage, price), plan(usage, price)
    rows = [
        f"CPU      {usage.cpu_seconds / HOUR:10.4f} h  * ${price.cpu_hour:g}/h = ${made.cpu:.6f}",
        f"GPU      {usage.gpu_seconds / HOUR:10.4f} h  * ${price.gpu_hour:g}/h = ${made.gpu:.6f}",
        f"data read{usage.bytes_read / GB:10.4f} GB * ${price.read_gb:g}/GB = ${made.read:.6f}",
        f"total ${made.total:.6f}, and ${made.storage_month:.6f} a month for {usage.stored_bytes / GB:.4f} GB kept",
        f"plan: ${planned.compute_price_per_hour:.4f}/h * {planned.hours_per_gb:.4f} h/GB * ({planned.data_gb:.4f} GB data + "
        f"{planned.model_gb:.4f} GB model) = ${planned.total:.6f}",
    ]
    return rows


@dataclass(frozen=True)
class Point:
    """A search after one more finished trial: what all trials cost so far, and the lowest validation loss so far."""

    trial: int
    spent: float
    best: float


def pays(points: Sequence[Point], window: int = 3, share: float = 0.1) -> tuple[bool, str]:
    """Whether one more trial still pays, and why, in a sentence.

    The marginal gain is what the last `window` trials took off the best validation loss, per unit spent. It no longer pays when
    that is less than `share` of what the search gained per unit from its first trial on.

    Args:
        points: In the order in which the trials finished; `spent` in any one unit.
        window: Trials that the marginal gain is taken over; one alone would be chance.
        share: Of the average gain.
    """
    if len(points) <= window:
        return True, f"{len(points)} trials are too few to say whether one more pays"
    first, before, last = points[0], points[-1 - window], points[-1]
    average = _ratio(first.best - last.best, last.spent - first.spent)
    marginal = _ratio(before.best - last.best, last.spent - before.spent)
    if average <= 0:
        return False, f"no trial was better than the first; {last.trial + 1} are enough to think about the space again"
    worth = marginal >= share * average
    said = "one more trial still pays" if worth else "one more trial no longer pays"
    return worth, f"{said}: the last {window} gained {marginal:.4g} per unit spent, the search {average:.4g} on average"


def _ratio(gain: float, spent: float) -> float:
    return gain / spent if spent > 0 else 0.0
