"""Settings of the whole folder."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """The models are too small for more."""
