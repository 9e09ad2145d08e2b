"""Who asks: from a request's headers to a key, and what that key may do.

`KeyRing` holds every key of the store by the hash of its secret; `sync.py` refreshes it. Pure but for the clock passed in.
The gateway calls `secret_of`, `KeyRing.find` and `check_model` for each request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cluster.errors import ApiError
from cluster.records import KeyRecord, hash_secret

HOW = "Send it as 'Authorization: Bearer <key>'."


def secret_of(headers: Mapping[bytes, bytes]) -> str:
    """The key in the headers: `Authorization: Bearer`, or Anthropic's `x-api-key`.

    Raises:
        ApiError: 401, when there is none.
    """
    given = headers.get(b"authorization", b"")
    scheme, _, secret = given.partition(b" ")
    if scheme.lower() != b"bearer" or not secret.strip():
        secret = headers.get(b"x-api-key", b"")
    if not secret.strip():
        raise ApiError(401, f"No API key was given. {HOW}", "missing_api_key", headers={"www-authenticate": "Bearer"})
    return secret.strip().decode("latin-1")


class KeyRing:
    """All keys, by the hash of their secret."""

    def __init__(self) -> None:
        self._by_hash: dict[str, KeyRecord] = {}

    def replace(self, keys: Iterable[KeyRecord]) -> None:
        """Take a new set of keys; the old one is forgotten."""
        self._by_hash = {key.hash: key for key in keys}

    def knows(self, secret: str) -> bool:
        """Whether a key, of whatever state, has this secret."""
        return hash_secret(secret) in self._by_hash

    def find(self, secret: str, now: float) -> KeyRecord:
        """The live key with this secret.

        Raises:
            ApiError: 401, when there is none, or it is revoked or expired.
        """
        key = self._by_hash.get(hash_secret(secret))
        if key is None:
            raise ApiError(401, f"The API key is not known. {HOW}", "invalid_api_key")
        if key.revoked_at is not None:
            raise ApiError(401, "The API key has been revoked. Ask an administrator for another.", "invalid_api_key")
        if not key.live(now):
            raise ApiError(401, "The API key has expired. Ask an administrator for another.", "invalid_api_key")
        return key


def check_model(key: KeyRecord, names: tuple[str, ...], asked: str) -> None:
    """Refuse a model that the key may not use. `names` are all the names the asked model and its base go by.

    Raises:
        ApiError: 403.
    """
    if key.models and not set(key.models) & {asked, *names}:
        raise ApiError(403, f"This API key may not use the model {asked!r}.", "model_not_allowed", param="model")


def check_admin(key: KeyRecord) -> None:
    """Refuse a key that is not an admin key.

    Raises:
        ApiError: 403.
    """
    if not key.admin:
        raise ApiError(403, "This needs an admin key.", "admin_key_required")
