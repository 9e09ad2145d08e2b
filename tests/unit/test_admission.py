"""Fairness and bounds of the queue before a model: the policy alone, then with real tasks that wait, leave and are cancelled."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from cluster.errors import ApiError
from serve_apps.admission import Admission, FairQueue, weight_of


class Limit:
    def __init__(self, slots: int) -> None:
        self.slots = slots

    def __call__(self) -> int:
        return self.slots


async def settled() -> None:
    """Let every task run until it waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def test_weights_are_powers_of_two_within_bounds():
    assert [weight_of(p) for p in (0, 1, 3, -2)] == [1.0, 2.0, 8.0, 0.25]
    assert weight_of(10**6) == 2.0**10 and weight_of(-(10**6)) == 2.0**-10


def test_a_thousand_waiting_items_do_not_delay_another_flow():
    queue: FairQueue[str] = FairQueue()
    for _ in range(1000):
        queue.push("greedy", "greedy", 10.0, 1.0)
    for _ in range(10):
        assert queue.pop() == "greedy"
    for _ in range(3):
        queue.push("polite", "polite", 10.0, 1.0)
        assert "polite" in (queue.pop(), queue.pop())


@pytest.mark.parametrize("priority", [1, 2, 3])
def test_service_follows_the_weights(priority):
    queue: FairQueue[str] = FairQueue()
    for flow, weight in (("high", weight_of(priority)), ("low", weight_of(0))):
        for _ in range(600):
            queue.push(flow, flow, 7.0, weight)
    served = Counter(queue.pop() for _ in range(450))
    assert served["high"] / served["low"] == pytest.approx(2**priority, rel=0.05)


def test_large_requests_get_fewer_turns():
    queue: FairQueue[str] = FairQueue()
    for _ in range(400):
        queue.push("large", "large", 1000.0, 1.0)
        queue.push("small", "small", 100.0, 1.0)
    served = Counter(queue.pop() for _ in range(330))
    assert served["small"] / served["large"] == pytest.approx(10, rel=0.1)


def test_idleness_earns_nothing():
    queue: FairQueue[str] = FairQueue()
    queue.push("sleeper", "sleeper", 1.0, 1.0)
    queue.pop()
    for _ in range(100):
        queue.push("busy", "busy", 10.0, 1.0)
    for _ in range(50):
        queue.pop()
    for _ in range(50):
        queue.push("sleeper", "sleeper", 10.0, 1.0)
    assert Counter(queue.pop() for _ in range(40)) == {"sleeper": 20, "busy": 20}


def test_one_flow_is_first_in_first_out():
    queue: FairQueue[int] = FairQueue()
    for number in range(50):
        queue.push("a", number, 1.0 + number % 7, 1.0)
    assert [queue.pop() for _ in range(50)] == list(range(50))
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop()


def test_what_gave_up_costs_its_flow_nothing():
    queue: FairQueue[object] = FairQueue()
    gone, kept, other = object(), object(), object()
    queue.push("a", gone, 1000.0, 1.0)
    assert queue.remove("a", gone) and not queue.remove("a", gone) and not queue.remove("b", gone)
    queue.push("b", other, 10.0, 1.0)
    queue.push("a", kept, 10.0, 1.0)
    assert len(queue) == 2 and {queue.pop(), queue.pop()} == {other, kept}


def test_the_limit_holds_and_every_slot_comes_back():
    async def test() -> None:
        admission = Admission("m", Limit(3), 100, 60.0)
        most = 0

        async def request(number: int) -> None:
            nonlocal most
            await admission.enter(f"key-{number % 5}", number % 3, 10.0)
            most = max(most, admission.running)
            await asyncio.sleep(0)
            admission.leave(0.01)

        await asyncio.gather(*(request(number) for number in range(80)))
        assert most == 3 and admission.running == 0 and admission.queued == 0

    run(test)


def test_a_full_queue_takes_from_the_greedy_and_refuses_who_is_over_its_share():
    async def test() -> None:
        limit = Limit(1)
        admission = Admission("m", limit, 4, 60.0)
        await admission.enter("greedy", 0, 1.0)
        greedy = [asyncio.create_task(admission.enter("greedy", 0, 1.0)) for _ in range(4)]
        await settled()
        assert admission.queued == 4
        with pytest.raises(ApiError) as refused:
            await admission.enter("greedy", 0, 1.0)
        assert refused.value.status == 503 and refused.value.code == "model_overloaded"
        assert int(refused.value.headers["retry-after"]) >= 1
        polite = asyncio.create_task(admission.enter("polite", 0, 1.0))
        await settled()
        assert [task.done() for task in greedy] == [False, False, False, True], "the newest of the greedy key pays"
        assert isinstance(greedy[3].exception(), ApiError) and not polite.done() and admission.queued == 4
        second = asyncio.create_task(admission.enter("polite", 0, 1.0))
        await settled()
        assert greedy[2].done() and not second.done(), "up to an equal share"
        with pytest.raises(ApiError):
            await admission.enter("polite", 0, 1.0)
        limit.slots = 10
        admission.refresh()
        await asyncio.gather(*greedy[:2], polite, second)
        assert admission.running == 5 and admission.queued == 0

    run(test)


def test_a_queue_of_length_zero_refuses_at_once():
    async def test() -> None:
        admission = Admission("m", Limit(1), 0, 60.0)
        await admission.enter("a", 0, 1.0)
        with pytest.raises(ApiError):
            await admission.enter("b", 0, 1.0)
        admission.leave(0.1)
        await admission.enter("b", 0, 1.0)
        assert admission.running == 1

    run(test)


def test_a_wait_that_is_too_long_ends_and_leaks_nothing():
    async def test() -> None:
        admission = Admission("m", Limit(1), 10, 0.05)
        await admission.enter("a", 0, 1.0)
        with pytest.raises(ApiError) as refused:
            await admission.enter("b", 0, 1.0)
        assert refused.value.status == 503 and "retry-after" in refused.value.headers
        assert admission.queued == 0 and admission.running == 1
        admission.leave(0.1)
        assert admission.running == 0

    run(test)


def test_a_waiter_that_leaves_frees_its_place():
    async def test() -> None:
        admission = Admission("m", Limit(1), 10, 60.0)
        await admission.enter("a", 0, 1.0)
        waiters = [asyncio.create_task(admission.enter("b", 0, 1.0)) for _ in range(3)]
        await settled()
        waiters[1].cancel()
        await settled()
        assert admission.queued == 2 and waiters[1].cancelled()
        admission.leave(0.1)
        await settled()
        assert [task.done() for task in waiters] == [True, True, False] and admission.running == 1

    run(test)


def test_leaving_at_the_moment_of_the_grant_gives_the_slot_to_the_next():
    async def test() -> None:
        admission = Admission("m", Limit(1), 10, 60.0)
        await admission.enter("a", 0, 1.0)
        first, second = (asyncio.create_task(admission.enter("b", 0, 1.0)) for _ in range(2))
        await settled()
        admission.leave(0.1)  # grants to the first, whose task has not run yet
        assert admission.running == 1 and not first.done()
        first.cancel()
        await settled()
        assert first.cancelled() and second.done() and admission.running == 1 and admission.queued == 0

    run(test)


def test_leaving_and_a_slot_in_the_same_moment_the_other_way_round():
    async def test() -> None:
        admission = Admission("m", Limit(1), 10, 60.0)
        await admission.enter("a", 0, 1.0)
        first, second = (asyncio.create_task(admission.enter("b", 0, 1.0)) for _ in range(2))
        await settled()
        first.cancel()
        admission.leave(0.1)
        await settled()
        assert first.cancelled() and second.done() and admission.running == 1 and admission.queued == 0

    run(test)


def test_random_cancellations_leak_no_slot():
    async def test() -> None:
        admission = Admission("m", Limit(4), 50, 60.0)

        async def request(number: int) -> None:
            await admission.enter(f"key-{number % 3}", 0, 1.0 + number % 11)
            try:
                for _ in range(number % 5):
                    await asyncio.sleep(0)
            finally:
                admission.leave(0.01)

        tasks = []
        for number in range(300):
            tasks.append(asyncio.create_task(request(number)))
            if number % 2:
                await asyncio.sleep(0)
            if number % 3 == 0:
                tasks[(number * 7) % len(tasks)].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert admission.running == 0 and admission.queued == 0

    run(test)


def test_a_limit_that_grows_or_shrinks_is_obeyed():
    async def test() -> None:
        limit = Limit(1)
        admission = Admission("m", limit, 10, 60.0)
        waiting = [asyncio.create_task(admission.enter("a", 0, 1.0)) for _ in range(6)]
        await settled()
        assert admission.running == 1
        limit.slots = 4
        await settled()
        assert admission.running == 1, "nobody has looked yet"
        admission.refresh()
        await settled()
        assert admission.running == 4
        limit.slots = 2
        for _ in range(2):
            admission.leave(0.1)
        await settled()
        assert admission.running == 2 and admission.queued == 2
        admission.leave(0.1)
        await settled()
        assert admission.running == 2 and sum(task.done() for task in waiting) == 5

    run(test)


def test_what_was_used_while_there_was_room_is_no_debt():
    async def test() -> None:
        limit = Limit(2)
        admission = Admission("m", limit, 100, 60.0)
        await admission.enter("large", 0, 1_000_000.0)
        admission.leave(0.1)
        limit.slots = 1
        await admission.enter("small", 0, 10.0)
        order: list[str] = []

        async def wait(key: str) -> None:
            await admission.enter(key, 0, 10.0)
            order.append(key)

        tasks = [asyncio.create_task(wait(key)) for key in ["small"] * 5 + ["large"]]
        await settled()
        while len(order) < 6:
            admission.leave(0.1)
            await settled()
        await asyncio.gather(*tasks)
        assert "large" in order[:2]

    run(test)
