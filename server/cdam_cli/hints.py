"""What may have been meant by a name that a server doesn't know."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice

import cdam

_PAGE = 1000


def hint(client: cdam.Client, error: cdam.NotFound, model: str) -> str:
    """The rest of the message, or nothing.

    Args:
        client: A client of the server.
        error: What it said.
        model: The model that was asked for; empty: the default one.
    """
    with suppress(cdam.CdamError):
        its_model = client.model(model).name
        concepts = list(islice(client.concepts(page_size=_PAGE), _PAGE))
        return "".join(f"; {said}" for said in _hints(error, its_model, concepts))
    return ""


def _hints(error: cdam.NotFound, model: str, concepts: Sequence[cdam.RegisteredConcept]) -> Iterator[str]:
    here = [concept.name for concept in concepts if concept.model == model]
    elsewhere = [concept.model for concept in concepts if concept.model != model and concept.name == error.name]
    if error.kind == "output" and error.name in here:
        yield f"for the concept: -t concept:{error.name}"
    if error.kind == "concept":
        if elsewhere:
            yield f"model {elsewhere[0]!r} has one: --model {elsewhere[0]}"
        yield from (f"did you mean {name!r}?" for name in get_close_matches(error.name, here, 1))
