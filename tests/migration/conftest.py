import pytest


@pytest.fixture(autouse=True)
def _default_logs(default_logs: None) -> None:
    """Every test here starts from them."""
