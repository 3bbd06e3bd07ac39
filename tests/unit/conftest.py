"""What every unit test starts from."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logs_as_by_default() -> Iterator[None]:
    """A server that another test runs in this process lets errors through alone."""
    configured = structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.configure(**configured)
