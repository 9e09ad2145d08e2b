"""The test hosts of this folder, made once for all its tests: `head`, `worker-1`, `worker-2` and `outsider`.

Hosts and their network have fixed names, so a second run on the same machine waits for the first. Where the kernel forbids
them the tests are skipped with the reason; with `CI` set they fail instead, for there the tests of hosts must not vanish
quietly.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from lan import FOLDERS, Host, Lan, why_not

NAMES = ("head", "worker-1", "worker-2", "outsider")
ONE_RUN = FOLDERS / "tplan.lock"


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the hosts' models are built into, once for all of them."""
    given = os.environ.get("TIDEPOOL_MODEL_CACHE")
    return Path(given) if given else tmp_path_factory.mktemp("model-cache")


@pytest.fixture(scope="session")
def lan(model_cache: Path) -> Iterator[Lan]:
    """The hosts, up; each test leaves them without processes and without files of its own."""
    reason = why_not()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(f"no test hosts in CI: {reason}", pytrace=False)
        pytest.skip(f"no test hosts: {reason}")
    model_cache.mkdir(parents=True, exist_ok=True)
    with ONE_RUN.open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with Lan(NAMES, keep=[model_cache]) as made:
            yield made


@pytest.fixture(scope="session")
def hosts(lan: Lan) -> dict[str, Host]:
    """The same by name."""
    return {host.name: host for host in lan.hosts}
