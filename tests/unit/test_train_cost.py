"""Costs add up, in the units they name, and the planning formula gives dollars."""

import json

import pytest

from cluster.train_config import ComputePrice, ScaleConfig, TrainConfig
from train import cost
from train.cost import Point, Usage
from train.meter import Meter
from train.storage import Storage

PRICE = ComputePrice(cpu_hour=0.04, gpu_hour=2.0, storage_gb_month=0.02, read_gb=0.01)


class Folder(dict[str, bytes]):
    """A run's folder in memory."""

    def exists(self, path: str) -> bool:
        return path in self

    def read_bytes(self, path: str) -> bytes:
        return self[path]

    def write_bytes(self, path: str, data: bytes) -> None:
        self[path] = data


def usage(**changed: float) -> Usage:
    made = {"seconds": 7200, "step_seconds": 3600, "cpu_seconds": 4 * 7200, "gpu_seconds": 7200, "bytes_read": 3 * 10**9}
    return Usage(**made | {"checkpoint_bytes": 8 * 10**9, "stored_bytes": 5 * 10**9, "model_bytes": 10**9} | changed)


def test_dollars_of_what_was_used():
    made = cost.cost(usage(), PRICE)
    assert made.cpu == pytest.approx(8 * 0.04)
    assert made.gpu == pytest.approx(2 * 2.0)
    assert made.read == pytest.approx(3 * 0.01)
    assert made.storage_month == pytest.approx(5 * 0.02)
    assert made.total == pytest.approx(0.32 + 4.0 + 0.03)
    assert cost.cost(usage(), ComputePrice()).total == 0


def test_workers_hold_what_they_reserve():
    assert cost.held(ScaleConfig(device="cpu", cpus_per_worker=2), 3, 10) == (60, 0)
    assert cost.held(ScaleConfig(device="gpu", cpus_per_worker=2), 3, 10) == (60, 30)


def test_the_formula_has_units_that_give_dollars():
    made = cost.plan(usage(), PRICE)
    # $2.16 an hour for 4 CPUs and a GPU; an hour of steps over 3 GB of data and 1 GB of model.
    assert made.compute_price_per_hour == pytest.approx(2.16)
    assert made.hours_per_gb == pytest.approx(0.25)
    assert (made.data_gb, made.model_gb) == (3, 1)
    assert made.total == pytest.approx(2.16 * 0.25 * 4)


def test_the_formula_at_its_own_pace_is_the_price_of_the_steps():
    alone = usage(step_seconds=7200, bytes_read=10**9)
    assert cost.plan(alone, PRICE).total == pytest.approx(cost.cost(alone, PRICE).total - cost.cost(alone, PRICE).read)


def test_the_formula_plans_twice_the_data_at_a_known_pace():
    pace = cost.plan(usage(), PRICE).hours_per_gb
    doubled = cost.plan(usage(bytes_read=7 * 10**9), PRICE, hours_per_gb=pace)
    assert doubled.total == pytest.approx(2 * cost.plan(usage(), PRICE).total)


def test_nothing_used_costs_nothing():
    assert cost.document(Usage(), PRICE)["plan"]["total_usd"] == 0


def test_a_resumed_run_adds_up():
    folder = Folder()
    cost.write(folder, usage(), PRICE)
    made = cost.write(folder, cost.read(folder) + usage(stored_bytes=6 * 10**9), PRICE)
    assert json.loads(folder["cost.json"]) == made
    assert made["usage"]["seconds"] == 14400 and made["usage"]["bytes_read"] == 6 * 10**9
    # What is kept and how large the model is are no sums.
    assert made["usage"]["stored_bytes"] == 6 * 10**9 and made["usage"]["model_bytes"] == 10**9
    assert made["measured_usd"]["total"] == pytest.approx(2 * (0.32 + 4.0 + 0.03))
    assert cost.read(folder).seconds == 14400


def test_the_bill_names_units():
    text = "\n".join(cost.lines(usage(), PRICE))
    for part in ("8.0000 h  * $0.04/h = $0.320000", "3.0000 GB", "total $4.350000", "h/GB", "GB data", "GB model"):
        assert part in text


def points(*bests: float) -> list[Point]:
    return [Point(number, float(number + 1), best) for number, best in enumerate(bests)]


def test_one_more_trial_pays_while_the_loss_falls():
    assert cost.pays(points(5.0))[1].startswith("1 trials are too few")
    assert cost.pays(points(5.0, 4.0, 3.0, 2.0, 1.0))[0]
    worth, said = cost.pays(points(5.0, 2.0, 1.0, 1.0, 1.0, 1.0))
    assert not worth and said.startswith("one more trial no longer pays: the last 3 gained 0 per unit spent, the search 0.8")
    assert cost.pays(points(1.0, 1.0, 1.0, 1.0)) == (False, "no trial was better than the first; 4 are enough to think about the "
                                                     "space again")  # fmt: skip


def test_a_run_is_metered_over_its_starts_and_sizes(tmp_path):
    config = TrainConfig.model_validate({
        "name": "r", "base": "scratch:chat", "data": {"train": ["a"]}, "batch_size": 4, "precision": "fp32",
        "scale": {"device": "cpu", "workers": (1, 2), "cpus_per_worker": 2}, "price": {"cpu_hour": 3.6},
    })  # fmt: skip
    run, clock = Storage.open(str(tmp_path / "r")), iter((0.0, 5.0, 15.0, 25.0, 0.0, 10.0, 20.0, 30.0))
    meter = Meter(config, run, None, lambda: next(clock))
    meter.read(1000, sequence_bytes=100)
    meter.holds(2)  # at 5 s
    meter.holds(1)  # at 15 s: one was lost
    meter.stepped([{"step_s": 2.0}, {"step_s": 3.0}])
    meter.saved(1200)
    used = meter.write()["usage"]  # at 25 s
    assert (used["seconds"], used["cpu_seconds"], used["step_seconds"]) == (25, 2 * 2 * 10 + 1 * 2 * 10, 5)
    assert (used["bytes_read"], used["checkpoint_bytes"], used["model_bytes"]) == (1000 + 2 * 4 * 100, 1200, 400)
    run.write_bytes("checkpoints/x", b"1" * 50)
    again = Meter(config, run, None, lambda: next(clock))
    again.holds(1)
    again.holds(0)
    made = again.write()
    assert (made["usage"]["seconds"], made["usage"]["cpu_seconds"]) == (25 + 30, 60 + 20)
    assert made["usage"]["stored_bytes"] > 50 and made["usage"]["model_bytes"] == 400
    assert made["measured_usd"]["total"] == pytest.approx(80 * 0.001)
