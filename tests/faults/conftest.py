"""Databases that tests may stop, kill and fill up."""

from collections.abc import Iterator

import pytest

from postgres import PostgresServer, postgres_or_skip


@pytest.fixture(autouse=True)
def _default_logs(default_logs: None) -> None:
    """Every test here starts from them."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server of the module's own: one that has made many databases takes long to recover."""
    with postgres_or_skip() as server:
        yield server


@pytest.fixture
def fresh_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server of the test's own, which has nothing else to write."""
    with postgres_or_skip() as server:
        yield server
