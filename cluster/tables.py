"""The tables of the store, the same on SQLite and PostgreSQL.

Only their shape; what is done with them is `cluster.store`, their only caller. Times are unix seconds (double precision),
so that both databases keep the same numbers. No foreign keys: keys are never deleted, only revoked, and usage may name a
key of an older store.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Double, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """All tables; `Base.metadata.create_all` makes them."""


class Key(Base):
    """One API key. `spent_usd` is kept beside the key so that a budget is read without summing its history."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    prefix: Mapped[str] = mapped_column(String(32))
    name: Mapped[str] = mapped_column(Text)
    admin: Mapped[bool]
    models: Mapped[list[str]] = mapped_column(JSON)
    rpm: Mapped[int | None] = mapped_column(BigInteger)
    tpm: Mapped[int | None] = mapped_column(BigInteger)
    max_parallel: Mapped[int | None] = mapped_column(BigInteger)
    priority: Mapped[int]
    expires_at: Mapped[float | None] = mapped_column(Double)
    budget_usd: Mapped[float | None] = mapped_column(Double)
    created_at: Mapped[float] = mapped_column(Double)
    revoked_at: Mapped[float | None] = mapped_column(Double)
    spent_usd: Mapped[float] = mapped_column(Double, default=0.0)


class Usage(Base):
    """Sums per key, model and minute."""

    __tablename__ = "usage"
    key_id: Mapped[str] = mapped_column(Text, primary_key=True)
    model: Mapped[str] = mapped_column(Text, primary_key=True)
    window_start: Mapped[int] = mapped_column(BigInteger, primary_key=True, index=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    errors: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    latency_s: Mapped[float] = mapped_column(Double)
    ttft_s: Mapped[float] = mapped_column(Double)
    cost_usd: Mapped[float] = mapped_column(Double)


class UsageBatch(Base):
    """A usage batch or lease call that was applied, so that a retry is not applied twice.

    `answer` is what a lease call was told, for the retry to be told the same; the row may go after `expires_at`.
    """

    __tablename__ = "usage_batches"
    id: Mapped[str] = mapped_column(Text, primary_key=True)
    answer: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON)
    expires_at: Mapped[float] = mapped_column(Double, index=True)


class BucketRow(Base):
    """The quota ledger's rate buckets; see `cluster.ledger.Bucket`."""

    __tablename__ = "buckets"
    key_id: Mapped[str] = mapped_column(Text, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    level: Mapped[float] = mapped_column(Double)
    updated_at: Mapped[float] = mapped_column(Double)


class SlotRow(Base):
    """The quota ledger's parallel slots; see `cluster.ledger.Slots`."""

    __tablename__ = "slots"
    key_id: Mapped[str] = mapped_column(Text, primary_key=True)
    gateway_id: Mapped[str] = mapped_column(Text, primary_key=True, index=True)
    count: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[float] = mapped_column(Double)


class Setting(Base):
    """Single values: the revision of the keys, the internal secret."""

    __tablename__ = "settings"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)
