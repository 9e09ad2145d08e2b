"""The embedded model's folder, and databases for the store's tests: SQLite files, and a PostgreSQL server on loopback.

The server is started here from Debian's binaries. Where PostgreSQL is not installed its tests are skipped, but in CI (environment
variable CI) they fail.
"""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a running server, without a database name."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        missing = "PostgreSQL's server is not installed: apt-get install postgresql"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    bin_dir = found[-1].parent
    # Not pytest's own folder: that one is closed to the unprivileged user which PostgreSQL insists on.
    folder = Path(tempfile.mkdtemp(prefix="tidepool-postgres-"))
    user = getpass.getuser()
    command = ["setpriv", "--pdeathsig", "INT"]
    if os.geteuid() == 0:
        user = next(name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})
        shutil.chown(folder, user)
        account = pwd.getpwnam(user)
        command += ["--reuid", str(account.pw_uid), "--regid", str(account.pw_gid), "--clear-groups"]
    data = str(folder / "data")
    init = [str(bin_dir / "initdb"), "-D", data, "-U", "tidepool", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"]
    subprocess.run([*command, *init], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [str(bin_dir / "postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", ""]
    log = folder / "log"
    with log.open("w") as output:
        server = subprocess.Popen([*command, *serve], stdout=output, stderr=output, cwd=folder)
    try:
        _wait_for(port, server, log)
        yield f"postgresql://tidepool@127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, once per kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite3'}"
    import psycopg

    server = request.getfixturevalue("postgres_server")
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{server}/{name}"


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with the tokenizer and template of the embedded one."""
    from cluster import embedded

    return embedded.build("embedded:random", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def chat_tokenizer(chat_folder: Path) -> Any:
    from train.dialogues import load_tokenizer

    return load_tokenizer(chat_folder)


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(f"postgresql://tidepool@127.0.0.1:{port}/postgres", connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL did not start:\n{log.read_text()}")
            time.sleep(0.05)
