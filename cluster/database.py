"""Opening a database: which URLs are allowed, and how SQLite is made to keep what it acknowledged.

No tables and no queries: those are `cluster.tables` and `cluster.store`. Callers: the store, and `launch` for the default URL.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from cluster.errors import StoreError

PATIENCE_S = 30.0


def default_url(run_dir: str | Path) -> str:
    """SQLite in the run directory, as an absolute URL."""
    return f"sqlite:///{Path(run_dir).resolve() / 'tidepool.db'}"


def checked_url(url: str) -> URL:
    """Read a database URL.

    Raises:
        StoreError: it is neither an absolute SQLite file nor a PostgreSQL address.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"store.url: {url.partition(':')[0][:20]}:...: is not a database URL") from error
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername != "sqlite":
        raise StoreError(f"store.url: {parsed.drivername}: use sqlite:////absolute/path or postgresql://user@host/database")
    if not parsed.database or not os.path.isabs(parsed.database):
        # A relative path would mean another file in each process, an empty one is memory, lost with the process.
        raise StoreError(f"store.url: {url}: SQLite needs an absolute path, such as sqlite:////var/lib/tidepool/tidepool.db")
    return parsed


def open_engine(url: URL) -> Engine:
    """Connections to a checked URL, made when first used; a SQLite file is made at once, for its owner only."""
    if url.drivername != "sqlite":
        try:
            return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
        except (ImportError, NoSuchModuleError) as error:
            raise StoreError("store.url: PostgreSQL needs its driver: pip install 'tidepool[postgres]'") from error
    path = Path(str(url.database))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # It holds the internal secret: for its owner only, before anything is in it (WAL files take the same mode).
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise StoreError(f"store.url: {path}: cannot be opened: {error.strerror}") from error
    engine = create_engine(url, connect_args={"timeout": PATIENCE_S, "check_same_thread": False})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_immediate)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late; `_begin_immediate` does it
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous=FULL")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """WAL. Of two that open a new file at the same time SQLite refuses one without waiting: both hold what the other needs."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _begin_immediate(connection: Any) -> None:
    # A transaction that reads and then writes must hold the write lock from its start, or it can fail as busy half way.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
