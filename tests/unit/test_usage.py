"""Tokens, money, and the book of what the store does not have yet."""

from __future__ import annotations

import pytest

from cluster.config import Price
from serve_apps.usage import Tokens, UsageBook, cost_usd


def test_the_engine_line_is_read():
    assert Tokens.parse(b"12 34 5") == Tokens.parse(b" 12 34 5\n\n") == Tokens(prompt=12, completion=34, cached=5)
    assert Tokens(3, 4, 1).total == 7
    for broken in (b"", b"1 2", b"1 2 3 4", b"1 2 x"):
        with pytest.raises(ValueError):
            Tokens.parse(broken)


@pytest.mark.parametrize(
    ("price", "tokens", "usd"),
    [
        (Price(), Tokens(10**6, 10**6, 0), 0.0),
        (Price(prompt=0.1, completion=0.4), Tokens(10**6, 10**6, 0), 0.5),
        (Price(prompt=0.1, cached=0.02, completion=0.4), Tokens(10**6, 0, 5 * 10**5), 0.06),
        (Price(prompt=0.1, completion=0.4), Tokens(10**6, 0, 5 * 10**5), 0.1),
        (Price(prompt=0.1, cached=0.0), Tokens(10**6, 0, 10**6), 0.0),
        (Price(prompt=1.0, cached=1.0), Tokens(5, 0, 10), 1e-5),
    ],
)
def test_money(price, tokens, usd):
    assert cost_usd(price, tokens) == pytest.approx(usd)


def add(book: UsageBook, key: str = "k", model: str = "m", now: float = 0.0, cost: float = 0.25, error: bool = False) -> None:
    book.add(key, model, now, Tokens(10, 5, 2), cost, 1.5, 0.5, error)


def test_rows_are_sums_per_key_model_and_minute():
    book = UsageBook()
    add(book, now=60.0)
    add(book, now=119.9, error=True)
    add(book, now=120.0)
    add(book, key="other", now=60.0)
    add(book, model="other", now=60.0)
    rows = {(row.key_id, row.model, row.window_start): row for row in book.take()}
    assert set(rows) == {("k", "m", 60), ("k", "m", 120), ("other", "m", 60), ("k", "other", 60)}
    row = rows["k", "m", 60]
    assert (row.requests, row.errors, row.prompt_tokens, row.completion_tokens, row.cached_tokens) == (2, 1, 20, 10, 4)
    assert (row.latency_s, row.ttft_s, row.cost_usd) == (3.0, 1.0, 0.5)
    assert all(isinstance(getattr(row, name), int) for name in ("requests", "errors", "prompt_tokens"))


def test_money_is_known_until_the_store_has_it():
    book = UsageBook()
    add(book)
    add(book, key="other", cost=9.0)
    assert book.pending_cost("k") == 0.25
    book.take()
    add(book)
    assert book.pending_cost("k") == 0.5, "sent, not acknowledged, and new"
    book.delivered()
    assert book.pending_cost("k") == 0.25 and book.pending_cost("nobody") == 0.0
    assert [row.cost_usd for row in book.take()] == [0.25]
    assert book.take() == []
