"""How targets, methods and sizes are spelled on the command line."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, Literal, TypeAlias, get_args, get_origin, get_type_hints

import click

import cdam

Given: TypeAlias = cdam.Output | cdam.TopK | cdam.Concept
"""What a --target can be."""

CONCEPT_NAME: Final = r"[A-Za-z0-9._-]{1,128}"
"""What a concept can be called, as a regular expression."""

CONCEPT_ID: Final = r"[0-9a-f]{64}"
WHOLE_ID: Final = "the whole id, 64 digits; `cdam concept show NAME` prints it"


def parse_target(text: str) -> Given:
    """The target that the command line spells so; see the help of `cdam explain`.

    Raises:
        click.BadParameter: if it spells none.
    """
    kind, given, rest = text.partition(":")
    if text.startswith("#"):
        return cdam.Output(_index(text[1:], 0, text))
    if given and kind == "index":
        return cdam.Output(_index(rest, 0, text))
    if given and kind == "top":
        return cdam.TopK(_index(rest, 1, text))
    if given and kind == "concept":
        return _concept(rest, text)
    name = text.removeprefix("name:")
    if not name:
        raise click.BadParameter(f"{text!r}: the name is missing")
    return cdam.Output(name)


def parse_minus(text: str) -> cdam.Output | cdam.Concept:
    """The output or concept that is to be subtracted.

    Raises:
        click.BadParameter: if it spells none, or several.
    """
    target = parse_target(text)
    if isinstance(target, cdam.TopK):
        raise click.BadParameter(f"{text!r} is not one output")
    return target


def parse_method(text: str) -> cdam.Method:
    """The method that "smooth_cdam" or "smooth_cdam:samples=20,noise=0.1" spells.

    Raises:
        click.BadParameter: if it spells none.
    """
    kind, _, rest = text.partition(":")
    if kind not in cdam.METHODS:
        raise click.BadParameter(f"{kind!r} is no method; there are {', '.join(cdam.METHODS)}")
    method = cdam.METHODS[kind]
    return method(**_given(method, rest, text))


def parse_evaluated(text: str) -> cdam.Method | cdam.Anchor:
    """The method, as of `parse_method`, or the anchor that is called so.

    Raises:
        click.BadParameter: if it spells none.
    """
    anchors = {anchor.value: anchor for anchor in cdam.Anchor}
    if text in anchors:
        return anchors[text]
    if text.partition(":")[0] not in cdam.METHODS:
        there_are = ", ".join([*cdam.METHODS, *anchors])
        raise click.BadParameter(f"{text!r} is neither a method nor an anchor; there are {there_are}")
    return parse_method(text)


def parse_metric(text: str) -> cdam.Metric:
    """The metric that "fidelity", "fidelity:points=6,unit=patch" or "class_discrimination:fidelity.points=6" spells.

    Raises:
        click.BadParameter: if it spells none.
    """
    kind, _, rest = text.partition(":")
    if kind not in cdam.METRICS:
        raise click.BadParameter(f"{kind!r} is no metric; there are {', '.join(cdam.METRICS)}")
    metric = cdam.METRICS[kind]
    given = _given(metric, rest, text)
    hints = get_type_hints(metric)
    parts: dict[str, dict[str, Any]] = {}
    for name in [name for name in given if "." in name]:
        part, _, parameter = name.partition(".")
        parts.setdefault(part, {})[parameter] = given.pop(name)
    return metric(**given, **{part: hints[part](**values) for part, values in parts.items()})


def _given(form: type[Any], rest: str, text: str) -> dict[str, Any]:
    """The parameters that "samples=20,noise=0.1" gives a method or metric; those of a part of it have a dot."""
    known = dict(_parameters(form))
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if name not in known:
            they_are = f"its parameters are {', '.join(known)}" if known else "it has no parameters"
            raise click.BadParameter(f"{text!r}: {name!r} is no parameter of {form.kind}; {they_are}")
        hint = known[name]
        try:
            given[name] = _reader(hint)(value if equals or hint is not bool else "true")
        except ValueError as error:
            raise click.BadParameter(f"{text!r}: {name} wants {error}") from error
    return given


def _parameters(form: type[Any]) -> Iterator[tuple[str, Any]]:
    """The names and types of what a method or metric can be told."""
    hints = get_type_hints(form)
    for field in dataclasses.fields(form):
        if dataclasses.is_dataclass(hints[field.name]):
            for name, hint in _parameters(hints[field.name]):
                yield f"{field.name}.{name}", hint
        else:
            yield field.name, hints[field.name]


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "224x336", or of "224" for both.

    Raises:
        click.BadParameter: if it is no size.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text)
    if not found:
        raise click.BadParameter(f"{text!r} is not HEIGHTxWIDTH in pixels, as in 224x336")
    return int(found[1]), int(found[2] or found[1])


def spelled(value: Any) -> str:
    """How the command line spells a target, a method or a metric."""
    if isinstance(value, cdam.Method | cdam.Anchor | cdam.Metric):
        said = ",".join(f"{name}={_word(given)}" for name, given in parameters(value).items())
        return f"{value.kind}:{said}" if said else value.kind
    match value:
        case cdam.TopK():
            return f"top:{value.k}"
        case cdam.Output():
            return f"#{value.selector}" if isinstance(value.selector, int) else value.selector
        case cdam.Concept():
            selector = value.name if value.id is None else f"id={value.id}"
            return f"concept:{selector}" + ("" if value.similarity == "dot" else f":{value.similarity}")
        case cdam.Contrast():
            return f"{spelled(value.positive)} --minus {spelled(value.negative)}"
        case _:
            return str(value)


def parameters(method: cdam.Method | cdam.Anchor | cdam.Metric) -> dict[str, Any]:
    """What a method or metric is told beside its defaults; nothing, of an anchor."""
    told: dict[str, Any] = {}
    if isinstance(method, cdam.Anchor):
        return told
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, cdam.Metric):  # a part of a metric
            told |= {f"{field.name}.{name}": part for name, part in parameters(value).items()}
        elif value != field.default:
            told[field.name] = value
    return told


def _concept(spelling: str, text: str) -> cdam.Concept:
    if spelling.startswith("id=") and not re.match(rf"id={CONCEPT_ID}(:|$)", spelling):
        raise click.BadParameter(f"{text!r}: {WHOLE_ID}")
    found = re.fullmatch(rf"(?:id=({CONCEPT_ID})|({CONCEPT_NAME}))(?::([a-z0-9]*))?", spelling)
    if not found:
        raise click.BadParameter(
            f"{text!r}: a concept goes by its name, letters, digits, '.', '_' and '-', or by id= and 64 hexadecimal "
            f"digits; for an output so called, 'name:{text}'"
        )
    concept_id, name, similarity = found.groups(default=None)
    known: dict[str | None, cdam.Similarity] = {None: "dot", **{word: word for word in get_args(cdam.Similarity)}}
    if similarity not in known:
        raise click.BadParameter(f"{text!r}: {similarity!r} is none of {', '.join(get_args(cdam.Similarity))}")
    return cdam.Concept(name, id=concept_id, similarity=known[similarity])


def _index(digits: str, least: int, text: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", digits) and int(digits) >= least:
        return int(digits)
    raise click.BadParameter(f"{text!r} wants a whole number from {least}; for an output so called, 'name:{text}'")


def _flag(text: str) -> bool:
    if text not in {"true", "false"}:
        raise ValueError("true or false")
    return text == "true"


def _whole_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):  # as much as the API's integers hold
        raise ValueError("a whole number from 0 to 999999999")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(_whole_number, text.split("+")))
    except ValueError:
        raise ValueError("whole numbers with + between them, as in 0+2") from None


def _one_of(words: Sequence[str], text: str) -> str:
    if text not in words:
        raise ValueError(" or ".join(words))
    return text


def _noise(text: str) -> cdam.Noise:
    kind, colon, level = text.rpartition(":")
    if colon and kind not in {"relative", "absolute"}:
        raise ValueError("a fraction of the range, as in 0.1, or absolute:0.5")
    return cdam.Noise(**{kind or "relative": _number(level)})


def _word(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case tuple():
            return "+".join(map(str, value))
        case cdam.Noise() if value.absolute is not None:
            return f"absolute:{value.absolute:g}"
        case cdam.Noise():
            return f"{value.relative:g}"
        case _:
            return str(value)


# How a parameter is read, by its type in the client's classes; a ValueError says what it wants.
_READERS: Final[dict[Any, Callable[[str], Any]]] = {
    bool: _flag,
    int | None: _whole_number,
    float | None: _number,
    tuple[int, ...]: _whole_numbers,
    cdam.Noise | float | None: _noise,
}


def _reader(hint: Any) -> Callable[[str], Any]:
    """How a parameter of a type is read; of words, given by name or left out, there are those of the type."""
    if hint in _READERS:
        return _READERS[hint]
    words = [word for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part)]
    return partial(_one_of, words)


def targets_or_default(targets: Sequence[Given], methods: Sequence[cdam.Method]) -> tuple[Given, ...]:
    """The targets; if there are none and a method needs one, what the model sees first."""
    if targets or (methods and not any(method.needs_target for method in methods)):
        return tuple(targets)
    return (cdam.TopK(1),)


target_option = click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    callback=lambda _ctx, _param, texts: tuple(map(parse_target, texts)),
    metavar="TARGET",
    help="What to explain; repeatable.  [top:1]",
)
method_option = click.option(
    "-m",
    "--method",
    "methods",
    multiple=True,
    callback=lambda _ctx, _param, texts: tuple(map(parse_method, texts)),
    metavar="METHOD",
    help=f"How; repeatable: {', '.join(cdam.METHODS)}.  [cdam]",
)
model_option = click.option("--model", default="", metavar="NAME", help="The model; without it, the server's default.")


def preprocessing_options(images: str = "the image", note: str = "") -> Callable[[Any], Any]:
    """The options that say how images become the model's input; the words say of which images, and what else there is to it."""
    resize = click.option(
        "--resize",
        type=click.Choice(get_args(cdam.Resize)),
        help=f"model: as it was evaluated, mostly the centre of {images}; squash: all of it.",
    )
    input_size = click.option(
        "--input-size",
        metavar="HxW",
        callback=lambda _ctx, _param, text: parse_size(text) if text else None,
        help=f"The model's input in pixels, where it is flexible{note}.",
    )
    return lambda command: resize(input_size(command))
