"""What the gateway reads of a request's body: the model, a cost, and the fields of a form."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import ApiError
from serve_apps.requests import LONGEST_ASSUMED, MOST_CHOICES, check_choices, estimate_tokens, model_name, parse_form


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "missing_model"),
        ({"model": None}, "missing_model"),
        ({"model": ""}, "missing_model"),
        ({"model": 7}, "invalid_type"),
        ({"model": ["a"]}, "invalid_type"),
        ({"model": {"a": 1}}, "invalid_type"),
        ({"model": False}, "invalid_type"),
    ],
)
def test_a_request_without_a_usable_model_is_400(fields, code):
    with pytest.raises(ApiError) as refused:
        model_name(fields)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, code, "model")


def test_the_model_is_taken_as_it_is():
    assert model_name({"model": " base:adapter"}) == " base:adapter"


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_tokens": 100}, 201),
        ({"max_completion_tokens": 10, "max_tokens": 100}, 111),
        ({"max_output_tokens": 30}, 131),
        ({"max_tokens": 100, "n": 3}, 401),
        ({"max_tokens": 10, "prompt": ["a", "b", "c"]}, 131),
        ({"max_tokens": 10, "prompt": ["a", "b"], "n": 2}, 141),
        ({"max_tokens": 10, "prompt": [1, 2, 3]}, 111),
        ({"max_tokens": 10, "prompt": [[1, 2], [3]]}, 121),
        ({}, 357),
        ({"max_tokens": -5, "n": -1}, 357),
        ({"max_tokens": "100", "n": "2"}, 357),
        ({"max_tokens": True, "n": True, "prompt": []}, 357),
        ({"max_tokens": 1.5}, 357),
        ({"max_tokens": 10**30}, LONGEST_ASSUMED),
    ],
)
def test_the_estimate_is_positive_and_bounded_whatever_is_asked(fields, tokens):
    assert estimate_tokens(400, fields) == tokens


@pytest.mark.parametrize("n", [None, 1, MOST_CHOICES, 0, -1, "300", True])
def test_choices_within_the_limit_are_left_to_the_engine(n):
    check_choices({"n": n})
    check_choices({})


@pytest.mark.parametrize("n", [MOST_CHOICES + 1, 16_384, 10**40, 1e9, float("inf")])
def test_too_many_choices_are_400(n):
    with pytest.raises(ApiError) as refused:
        check_choices({"n": n})
    assert (refused.value.status, refused.value.param) == (400, "n")


def form(*parts: tuple[str, bytes], boundary: bytes = b"XX") -> bytes:
    body = b"".join(b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (boundary, n.encode(), v) for n, v in parts)
    return body + b"--%b--\r\n" % boundary


def read(body: bytes, content_type: str = "multipart/form-data; boundary=XX") -> dict:
    return asyncio.run(parse_form(body, content_type))


def test_a_form_gives_its_text_fields():
    body = form(('name="model"', b"whisper"), ('name="stream"', b"true"), ('name="file"; filename="a.wav"', b"\x00\xff" * 50))
    assert read(body) == {"model": "whisper", "stream": True}
    assert read(form(('name="model"', b"a"), ('name="model"', b"b")))["model"] == "b"
    assert read(form(('name="stream"', b"false")))["stream"] == "false"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"x", "multipart/form-data"),
        (b"not a form at all", "multipart/form-data; boundary=XX"),
        (form(('name="model"', b"a"))[:-20], "multipart/form-data; boundary=YY"),
        (b"--XX\r\nContent-Disposition: form-data\r\n\r\nv\r\n--XX--\r\n", "multipart/form-data; boundary=XX"),
        (b"--XX\r\n\x00: \r\n\r\nv\r\n--XX--\r\n", "multipart/form-data; boundary=XX"),
        (form(('name="big"', b"x" * (2 << 20))), "multipart/form-data; boundary=XX"),
        (form(*[('name="f"', b"v")] * 1500), "multipart/form-data; boundary=XX"),
        (b"", "multipart/form-data; boundary=" + "X" * 10_000),
    ],
)
def test_a_broken_form_is_400_or_has_no_model(body, content_type):
    try:
        assert "model" not in read(body, content_type)
    except ApiError as error:
        assert (error.status, error.code) == (400, "invalid_form")


def test_a_form_with_a_name_that_is_no_utf8():
    try:
        read(form(('name="model"', b"\xff\xfe")), "multipart/form-data; boundary=XX; charset=utf-8")
    except ApiError as error:
        assert error.status == 400
