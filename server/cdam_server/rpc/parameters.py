"""Parameters of methods and metrics: what a field of their messages says, both ways."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cdam_server.errors import InvalidArgumentError

T = TypeVar("T")


@dataclass(frozen=True)
class Parameter:
    """A parameter; unless it says otherwise its value travels as it is.

    Attributes:
        read: Makes a value of what a field says, given the field's path from the request's root, and the largest number of
            draws; None if that says nothing. Raises InvalidArgumentError.
        write: Makes of a value what the field says.
    """

    read: Callable[[Any, str, int], Any] = lambda said, _field, _most: said
    write: Callable[[Any], Any] = lambda value: value


Parameters = Mapping[str, Parameter]
"""The parameters of a kind, by the name that they have in the engine and in the message, in the order in which they are read."""


def decoded(form: type[T], parameters: Parameters, message: Any, field: str, most: int = 0) -> T:
    """The method or metric of a message; what that does not say is left to the engine's defaults.

    Args:
        form: Its class.
        parameters: Its parameters.
        message: The message.
        field: Its path from the request's root, for errors.
        most: Largest number of draws, or of points on a path.

    Raises:
        InvalidArgumentError: A parameter is out of bounds.
    """
    said = {
        name: parameter.read(getattr(message, name), f"{field}.{name}", most)
        for name, parameter in parameters.items()
        if _is_said(message, name)
    }
    return form(**{name: value for name, value in said.items() if value is not None})


def encoded(parameters: Parameters, settings: Any) -> dict[str, Any]:
    """The fields of a method's or metric's message."""
    return {name: parameter.write(getattr(settings, name)) for name, parameter in parameters.items()}


def _is_said(message: Any, name: str) -> bool:
    has_presence = message.DESCRIPTOR.fields_by_name[name].has_presence
    return message.HasField(name) if has_presence else bool(getattr(message, name))


def word(noun: str, **values: int) -> Parameter:
    """One of an enum's words.

    Args:
        noun: What they are, with its article.
        values: The enum's value for each.
    """
    words = {value: name for name, value in values.items()}

    def read(value: int, field: str, _most: int) -> str:
        if value not in words:
            raise InvalidArgumentError(field, f"{value} is not {noun}")
        return words[value]

    return Parameter(read, values.__getitem__)


def number(wanted: str, allowed: Callable[[float], bool]) -> Parameter:
    """A number.

    Args:
        wanted: What it must be, in words.
        allowed: Whether it is.
    """

    def read(value: float, field: str, _most: int) -> float:
        if not allowed(value):
            raise InvalidArgumentError(field, f"must be {wanted}, not {_figure(value)}")
        return value

    return Parameter(read)


def within(least: float, most: float) -> Parameter:
    """A number from `least` to `most`."""
    return number(f"from {_figure(least)} to {_figure(most)}", lambda value: least <= value <= most)


def _figure(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def part(form: type[Any], parameters: Parameters) -> Parameter:
    """A method or metric within another."""
    return Parameter(
        lambda message, field, most: decoded(form, parameters, message, field, most),
        lambda settings: encoded(parameters, settings),
    )
