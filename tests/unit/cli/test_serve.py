"""The options of `cdam serve` say of every setting what the settings say themselves."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
import pytest
from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from cdam_cli.serve import serve
from cdam_server.settings.config import Settings

OPTIONS = {option.name: option for option in serve.params if isinstance(option, click.Option) and option.name}
FIELDS = Settings.model_fields
# What the help says of settings whose default is no value.
WORDS = {
    "model_name": "the architecture",
    "num_outputs": "as many as the classifier has",
    "tracing_endpoint": "none",
    "front_ends": "by the cores",
}
every_setting = pytest.mark.parametrize("name", FIELDS)


def kind(field: FieldInfo) -> Any:
    """Its type without None."""
    members = get_args(field.annotation)
    return next(each for each in members if each is not NoneType) if NoneType in members else field.annotation


def test_every_setting_has_an_option_and_every_option_a_setting() -> None:
    assert set(OPTIONS) - {"config"} == set(FIELDS)
    for name, option in OPTIONS.items():
        assert option.opts == [f"--{name.replace('_', '-')}"]


@every_setting
def test_choices(name: str) -> None:
    option, its = OPTIONS[name].type, kind(FIELDS[name])
    choices = get_args(its) if get_origin(its) is Literal else ()
    assert (tuple(option.choices) if isinstance(option, click.Choice) else ()) == choices


@every_setting
def test_ranges(name: str) -> None:
    option, field = OPTIONS[name].type, FIELDS[name]
    of_option: tuple[Any, ...] = (None, None)
    if isinstance(option, click.IntRange | click.FloatRange):
        assert not option.min_open
        assert not option.max_open
        of_option = option.min, option.max
    least = next((bound.ge for bound in field.metadata if isinstance(bound, Ge)), None)
    most = next((bound.le for bound in field.metadata if isinstance(bound, Le)), None)
    assert of_option == (least, most)
    assert isinstance(option, click.IntRange) == (kind(field) is int)
    assert isinstance(option, click.FloatRange) == (kind(field) is float)
    assert OPTIONS[name].is_flag == (kind(field) is bool)
    assert isinstance(option, click.Path) == (kind(field) is Path)


@every_setting
def test_defaults(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    match FIELDS[name].get_default(call_default_factory=True):
        case None | bool():
            printed = ""
        case float(number):
            printed = f"{number:g}"
        case Path() as folder:
            printed = f"~/{folder.relative_to(Path.home())}"
        case value:
            printed = str(value)
    found = re.search(r"  \[(.*)\]$", OPTIONS[name].help or "")
    assert (found[1] if found else "") == WORDS.get(name, printed)
