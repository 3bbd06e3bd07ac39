"""Variables of other programs, and of templates, in the environment of a server."""

from __future__ import annotations

import os
from typing import Any

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from cdam_server.settings.config import Settings, unknown_variables, warn_of_unknown_variables


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name.upper().startswith("CDAM_"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_an_empty_variable_is_none(environment: pytest.MonkeyPatch) -> None:
    """IBM/mcp-context-forge#6122, pydantic-settings#198: compose makes "" of a value that was not given."""
    defaults = Settings.load().model_dump()
    for field in Settings.model_fields:
        environment.setenv(f"CDAM_{field.upper()}", "")
    assert Settings.load().model_dump() == defaults
    assert not unknown_variables()


def test_a_variable_that_is_wrong_is_still_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CDAM_THREADS", "many")
    with pytest.raises(ValidationError, match="threads"):
        Settings.load()


@pytest.mark.parametrize("service", ["CDAM", "CDAM_STORE", "CDAM_SERVER", "CDAM_ADDRESS", "CDAM_MODEL"])
def test_links_to_services_are_no_settings(environment: pytest.MonkeyPatch, service: str) -> None:
    """elastic/cloud-on-k8s#1987, langgenius/dify#539, cerebro#441: a service of the program's own name set its port."""
    defaults = Settings.load().model_dump()
    link = {
        "SERVICE_HOST": "10.0.48.109",
        "SERVICE_PORT": "8001",
        "SERVICE_PORT_GRPC": "8001",
        "PORT": "tcp://10.0.48.109:8001",
        "PORT_8001_TCP": "tcp://10.0.48.109:8001",
        "PORT_8001_TCP_PROTO": "tcp",
        "PORT_8001_TCP_PORT": "8001",
        "PORT_8001_TCP_ADDR": "10.0.48.109",
    }
    for name, value in link.items():
        environment.setenv(f"{service}_{name}", value)
    assert Settings.load().model_dump() == defaults
    assert not unknown_variables()


def test_links_of_docker_are_no_settings(environment: pytest.MonkeyPatch) -> None:
    """kubernetes#1431: the same without _SERVICE_HOST, and the linked container's own environment."""
    defaults = Settings.load().model_dump()
    environment.setenv("CDAM_PORT", "tcp://172.17.0.5:8001")
    for name in ("NAME", "PORT_8001_TCP_ADDR", "ENV_PATH", "ENV_CDAM_MODEL"):
        environment.setenv(f"CDAM_{name}", "/web/cdam")
    assert Settings.load().model_dump() == defaults
    assert not unknown_variables()
    environment.setenv("CDAM_MODLE", "x")
    assert unknown_variables() == {"CDAM_MODLE": "CDAM_MODEL"}


@pytest.mark.usefixtures("default_logs")
def test_another_programs_variables_take_one_line(environment: pytest.MonkeyPatch) -> None:
    """What is like a setting has a line of its own, with the setting; the rest is named once."""
    others = [f"CDAM_{word}{number}" for word in ("QZX", "WWJ") for number in range(20)]
    for name in (*others, "CDAM_MAX_BACH_SIZE"):
        environment.setenv(name, "1")
    assert Settings.load().max_batch_size == 16
    with capture_logs() as logs:
        warn_of_unknown_variables()
    said: dict[str, Any] = {entry["event"]: entry for entry in logs}
    assert len(logs) == 2
    assert said["unknown environment variable"]["similar"] == "CDAM_MAX_BATCH_SIZE"
    assert sorted(said["unknown environment variables"]["names"]) == sorted(others)
