"""How many front ends there are, by cores, limits of a container, and settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cdam_server.processes import front_ends
from cdam_server.processes.front_ends import number_of
from cdam_server.settings.config import Settings


@pytest.mark.parametrize(
    ("cores", "limit", "settings", "expected"),
    [
        (1, "max 100000", {}, 1),
        (2, "max 100000", {}, 2),
        (4, "max 100000", {}, 3),
        (64, "400000 100000", {}, 3),
        (64, "50000 100000", {}, 1),
        (4, "", {}, 3),
        (16, "max 100000", {"device": "cuda:0,cuda:1"}, 14),
        (64, "max 100000", {}, 16),
        (4, "max 100000", {"address": "unix:/tmp/cdam"}, 1),
        (4, "max 100000", {"front_ends": 0}, 0),
        (4, "max 100000", {"front_ends": 7}, 7),
    ],
)
def test_how_many_front_ends(
    cores: int,
    limit: str,
    settings: dict[str, Any],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "cpu.max").write_text(limit + "\n")
    monkeypatch.setattr(front_ends, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert number_of(Settings.load(**settings)) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"address": "unix:/tmp/cdam", "front_ends": 2}, "front_ends must be 0 or 1"),
        ({"device": "cpu,cpu", "front_ends": 0}, "front_ends must not be 0"),
        ({"front_ends": 65}, "less than or equal to 64"),
        ({"device": ",".join(["cpu"] * 17)}, "at most 16 are allowed"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings.load(**settings)
