"""A real server for the tests that talk to one."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def server_address() -> Iterator[str]:
    """Address of a server of the demo model in a thread of this process."""
    from cdam_server import logs
    from cdam_server.bootstrap import serve_in_background
    from cdam_server.config import Settings

    settings = Settings.load(address="127.0.0.1:0", admin_address="127.0.0.1:0")
    logs.configure("console", "error")
    with serve_in_background(settings) as address:
        yield address
