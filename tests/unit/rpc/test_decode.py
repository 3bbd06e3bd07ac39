"""Names in requests: none that an error could not carry."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest

from cdam_server.errors import InvalidArgumentError, NotFoundError
from cdam_server.rpc import fields
from cdam_server.rpc.decode import check_name
from cdam_server.rpc.status import status_of

_TRAILERS = 8192  # bytes, gRPC's soft limit: beyond it answers are refused at random
_LONGEST = ["x" * 256, "'" * 256, "\u597d" * 256, "\U0001f600" * 192, "\U000e0001" * 76, "\x7f" * 192]


@pytest.mark.parametrize("name", _LONGEST, ids=ascii)
def test_an_error_carries_the_longest_names(name: str) -> None:
    check_name(name, "targets[0].output.name")
    message = f"model 'demo' has no output named {name!r}"
    field = "targets[15].contrast.positive.output.name"
    status = status_of(NotFoundError("output", name, message, field=field), "r" * 128)
    sent = len(quote(status.message)) + sum(
        len(base64.b64encode(value) if isinstance(value, bytes) else value) for _, value in status.trailing_metadata()
    )
    assert sent < _TRAILERS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 257, "has 257 characters; at most 256 are allowed"),
        ("\U0001f600" * 193, "takes 772 bytes to show; at most 768 are allowed"),
        ("\U000e0001" * 77, "takes 770 bytes to show; at most 768 are allowed"),
    ],
    ids=ascii,
)
def test_longer_ones_are_refused(name: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        check_name(name, "model")
    assert (refused.value.field, refused.value.description) == ("model", message)


def test_what_a_registration_says_is_found_in_its_specification() -> None:
    for field in ("name", "vector", "model_fingerprint", "expected_version"):
        assert fields.of_registration(field) == f"spec.{field}"
    assert fields.of_registration("images[3]") == "images[3]"
