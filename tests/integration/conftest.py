"""What tests of real servers share."""

from collections.abc import Iterator

import grpc
import pytest

from calls import Stub


@pytest.fixture(scope="module")
def stub(server_address: str) -> Iterator[Stub]:
    """Of the server of the demo model."""
    with grpc.insecure_channel(server_address) as channel:
        yield Stub(channel)
