from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cdam_server.store import ConceptStore
from cdam_server.store.cache import CachedStore
from contract.backends import Place


@pytest.fixture(autouse=True)
def _default_logs(default_logs: None) -> None:
    """Every test here starts from them."""


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return Place("sqlite", str(tmp_path / "data"))
    return Place("postgres", request.getfixturevalue("postgres").new_database())


@pytest.fixture(params=["plain", "cached"])
async def store(request: pytest.FixtureRequest, place: Place) -> AsyncIterator[ConceptStore]:
    store = place.store()
    if request.param == "cached":
        store = CachedStore(store)
    await store.open()
    yield store
    await store.close()
