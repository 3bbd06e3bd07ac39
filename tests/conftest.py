"""Real servers for the tests that talk to one."""

from collections.abc import Iterator

import pytest
import structlog

from postgres import PostgresServer, postgres_or_skip
from scripted_server import Script, serving


@pytest.fixture(scope="session", autouse=True)
def _no_concepts_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers that are told nothing keep concepts in a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture
def default_logs() -> Iterator[None]:
    """Logs as they are by default: a server that another test runs in this process lets errors through alone."""
    configured = structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.configure(**configured)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes with one: on a busy machine more only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def server_address() -> Iterator[str]:
    """Address of a server of the demo model in a thread of this process."""
    from cdam_server.operation import logs
    from in_this_process import served

    logs.configure("console", "error")
    with served() as address:
        yield address


@pytest.fixture
def script() -> Iterator[Script]:
    """A server without a model, which does what the test tells it."""
    with serving(Script()) as script:
        yield script


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server of our own; a test that stops it starts it again."""
    with postgres_or_skip() as server:
        yield server
