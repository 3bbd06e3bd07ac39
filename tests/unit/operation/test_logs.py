"""Log lines: JSON for machines, each written at once."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import structlog

from cdam_server.operation import logs


class Pieces(io.StringIO):
    """A file that keeps what it is given piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return len(text)


def configured(monkeypatch: pytest.MonkeyPatch, level: str, **always: object) -> Pieces:
    """What is logged as JSON from now on."""
    file = Pieces()
    monkeypatch.setattr("sys.stderr", file)
    logs.configure("json", level, **always)
    return file


def test_a_line_of_json_is_written_at_once_with_all_that_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    file = configured(monkeypatch, "info")
    with structlog.contextvars.bound_contextvars(request_id="a"):
        structlog.get_logger("cdam.test").info("rpc", seconds=0.5, methods=["cdam"], file=Path("x"))
    (line,) = file.pieces
    assert line.endswith("}\n")
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "rpc",
        "level": "info",
        "seconds": 0.5,
        "methods": ["cdam"],
        "file": repr(Path("x")),
        "request_id": "a",
    }


def test_what_is_always_true_is_in_every_line_unless_the_line_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    file = configured(monkeypatch, "info", process="front_end-1")
    structlog.get_logger("cdam.test").info("ready")
    structlog.get_logger("cdam.test").info("replaced", process="front_end-0")
    first, second = map(json.loads, file.pieces)
    assert first["process"] == "front_end-1"
    assert second["process"] == "front_end-0"


def test_an_error_is_logged_with_its_traceback_and_lesser_levels_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    file = configured(monkeypatch, "warning")
    structlog.get_logger("cdam.test").info("rpc")
    structlog.get_logger("cdam.test").error("internal error", exc_info=ValueError("wrong"))
    (line,) = file.pieces
    assert "ValueError: wrong" in json.loads(line)["exception"]
