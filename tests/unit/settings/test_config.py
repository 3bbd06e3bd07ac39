"""Settings: what is read, and what only looks as if it were."""

from __future__ import annotations

import os

import pytest

from cdam_server.compute.catalog import _batch_sizes
from cdam_server.settings.config import Settings, unknown_variables


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name.startswith("CDAM_"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_misspelled_variables_are_found(environment: pytest.MonkeyPatch) -> None:
    for name in ("CDAM_MAX_BACH_SIZE", "cdam_modle", "CDAM_PORT", "CDAM_QQQQQQQ", "OTHER_MODEL"):
        environment.setenv(name, "1")
    assert unknown_variables() == {
        "CDAM_MAX_BACH_SIZE": "CDAM_MAX_BATCH_SIZE",
        "CDAM_MODLE": "CDAM_MODEL",
        "CDAM_PORT": "",
        "CDAM_QQQQQQQ": "",
    }


def test_known_variables_are_not(environment: pytest.MonkeyPatch) -> None:
    for name in (*(f"CDAM_{field.upper()}" for field in Settings.model_fields), "cdam_device"):
        environment.setenv(name, "1")
    for name in ("CDAM_CONFIG", "CDAM_SERVER", "CDAM_TOKEN"):  # the command line's
        environment.setenv(name, "1")
    assert not unknown_variables()


def test_what_kubernetes_says_of_services_is_no_setting(environment: pytest.MonkeyPatch) -> None:
    for service in ("CDAM", "CDAM_SERVE"):
        for suffix in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_8001_TCP"):
            environment.setenv(f"{service}_{suffix}", "1")
        for part in ("PROTO", "PORT", "ADDR"):
            environment.setenv(f"{service}_PORT_8001_TCP_{part}", "1")
    assert not unknown_variables()
    environment.setenv("CDAM_SERVE_MODEL", "1")
    assert list(unknown_variables()) == ["CDAM_SERVE_MODEL"]


@pytest.mark.parametrize(
    ("max_batch_size", "max_pending", "sizes"),
    [
        (1, 256, (1,)),
        (2, 256, (1, 2)),
        (12, 256, (1, 2, 4, 8, 12)),
        (16, 256, (1, 2, 4, 8, 16)),
        (16, 3, (1, 2, 3)),
    ],
)
def test_sizes_of_batches_that_there_can_be(max_batch_size: int, max_pending: int, sizes: tuple[int, ...]) -> None:
    assert _batch_sizes(Settings.load(max_batch_size=max_batch_size, max_pending=max_pending)) == sizes


@pytest.mark.parametrize(
    ("size", "pixels"), [("224", (224, 224)), ("224x336", (224, 336)), (96, (96, 96)), ([32, 48], (32, 48))]
)
def test_input_sizes(size: object, pixels: tuple[int, int]) -> None:
    settings = Settings.load(model="vit_tiny_patch16_224", random_weights=True, input_size=size)
    assert settings.specs()[0].input_size == pixels


@pytest.mark.parametrize("size", ["big", "224x", "1x2x3", "-1"])
def test_input_sizes_that_make_no_sense(size: str) -> None:
    with pytest.raises(ValueError, match="input_size"):
        Settings.load(model="vit_tiny_patch16_224", random_weights=True, input_size=size)
