"""Keys from headers: who is let in, and with what words the others are not."""

from __future__ import annotations

import pytest

from cluster.errors import ApiError
from cluster.records import KeyRecord, hash_secret
from serve_apps.auth import KeyRing, check_admin, check_model, secret_of

SECRET = "tp-secret"


def record(**more) -> KeyRecord:
    return KeyRecord(**{"name": "n", "id": "key_1", "hash": hash_secret(SECRET), "prefix": "tp-", "created_at": 0.0, **more})


def ring(*keys: KeyRecord) -> KeyRing:
    made = KeyRing()
    made.replace(keys)
    return made


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": b"Bearer tp-secret"},
        {b"authorization": b"bearer   tp-secret  "},
        {b"x-api-key": b"tp-secret"},
        {b"authorization": b"Basic dXNlcjpw", b"x-api-key": b"tp-secret"},
        {b"authorization": b"Bearer ", b"x-api-key": b"tp-secret"},
    ],
)
def test_where_a_key_may_be(headers):
    assert secret_of(headers) == SECRET


@pytest.mark.parametrize(
    "headers",
    [{}, {b"authorization": b"tp-secret"}, {b"authorization": b"Bearer"}, {b"x-api-key": b" "}, {b"api-key": b"tp-secret"}],
)
def test_no_key_is_401(headers):
    with pytest.raises(ApiError) as refused:
        secret_of(headers)
    assert refused.value.status == 401 and refused.value.code == "missing_api_key"
    assert refused.value.headers["www-authenticate"] == "Bearer"


def test_bytes_that_are_no_text_are_just_an_unknown_key():
    with pytest.raises(ApiError) as refused:
        ring(record()).find(secret_of({b"authorization": b"Bearer \xff\xfe"}), 0.0)
    assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (record(hash=hash_secret("another")), "not known"),
        (record(revoked_at=5.0), "revoked"),
        (record(expires_at=99.0), "expired"),
        (record(revoked_at=5.0, expires_at=99.0), "revoked"),
    ],
)
def test_a_key_that_is_not_live_is_401(key, words):
    with pytest.raises(ApiError) as refused:
        ring(key).find(SECRET, 100.0)
    assert refused.value.status == 401 and words in refused.value.message and SECRET not in refused.value.message


def test_a_live_key_is_found_until_it_expires():
    keys = ring(record(expires_at=100.0))
    assert keys.find(SECRET, 99.9).id == "key_1" and keys.knows(SECRET)
    with pytest.raises(ApiError):
        keys.find(SECRET, 100.0)
    keys.replace([])
    assert not keys.knows(SECRET)


@pytest.mark.parametrize(
    ("allowed", "asked", "passes"),
    [
        ((), "base", True),
        (("base",), "base", True),
        (("base",), "base:adapter", True),
        (("alias",), "base", True),
        (("base:adapter",), "base:adapter", True),
        (("base:adapter",), "base", False),
        (("base:adapter",), "base:other", False),
        (("other",), "base", False),
        (("bas", "base "), "base", False),
    ],
)
def test_models_of_a_key(allowed, asked, passes):
    key = record(models=allowed)
    if passes:
        check_model(key, ("base", "alias"), asked)
        return
    with pytest.raises(ApiError) as refused:
        check_model(key, ("base", "alias"), asked)
    assert refused.value.status == 403 and refused.value.code == "model_not_allowed" and refused.value.param == "model"


def test_admin_is_a_property_of_the_key():
    check_admin(record(admin=True))
    with pytest.raises(ApiError) as refused:
        check_admin(record(name="admin"))
    assert refused.value.status == 403
