"""Starts the store's actor on a new cluster and makes sure that the first two keys exist: an administrator's and a client's.

Run by `launch.up` as `python -m cluster.credentials` in the cluster's environment, so that `up` itself never becomes a driver.
Reads the secrets it may reuse as JSON on standard input and prints those that hold on standard output.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def ensure(url: str, kept: dict[str, Any]) -> dict[str, Any]:
    """The secrets of a live admin key and a live client key.

    Args:
        url: The store's SQLAlchemy URL.
        kept: `admin_key` and `api_key` of an earlier run; used again if the store still honours them.

    Returns:
        `admin_key`, `api_key`, and `admin_key_shown`: whether an earlier `up` has printed the first.
    """
    import time

    import ray

    from cluster import store_actor
    from cluster.records import KeySpec, hash_secret

    actor = store_actor.connect(url)
    live = {record.hash: record for record in ray.get(actor.list_keys.remote()) if record.live(time.time())}

    def holds(name: str, admin: bool) -> bool:
        record = live.get(hash_secret(kept.get(name, "")))
        return record is not None and record.admin == admin

    admin = kept.get("admin_key")
    old_admin = holds("admin_key", True)
    if not old_admin:
        admin = ray.get(actor.ensure_admin_key.remote())
        if admin is None:
            # One exists, but its secret is not in the run directory any more.
            _, admin = ray.get(actor.create_key.remote(KeySpec(name="admin", admin=True)))
    client = kept.get("api_key")
    if not holds("api_key", False):
        _, client = ray.get(actor.create_key.remote(KeySpec(name="default")))
    return {"admin_key": admin, "api_key": client, "admin_key_shown": old_admin and bool(kept.get("admin_key_shown"))}


def main() -> None:
    """Join the cluster named by the environment, print the answer as one line of JSON."""
    import ray

    from cluster.errors import TidepoolError

    asked = json.load(sys.stdin)
    ray.init(address=asked["address"], namespace="tidepool", log_to_driver=False, logging_level="error")
    try:
        answer = ensure(asked["url"], asked["kept"])
    except TidepoolError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        ray.shutdown()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
