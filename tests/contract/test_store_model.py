"""Whatever is done to a store, it says what a dict would."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdam_server.store import ConceptStore, NameTakenError, Registration, Version, VersionMismatchError
from contract.backends import content, digest

Words = tuple[int, int, str, dict[str, str]]  # number, seed of the content, description, labels

_NAMES = ("a", "B", "é")
_LABELS = st.dictionaries(st.sampled_from(["k", "l"]), st.sampled_from(["", "v"]))
_EXPECTED = st.one_of(st.none(), st.integers(0, 3))
_REGISTER = st.fixed_dictionaries(
    {
        "name": st.sampled_from(_NAMES),
        "seed": st.integers(0, 2),
        "description": st.sampled_from(["", "words"]),
        "labels": _LABELS,
        "replace": st.booleans(),
        "expected": _EXPECTED,
    }
)
_DELETE = st.fixed_dictionaries({"name": st.sampled_from(_NAMES), "expected": _EXPECTED})
_STEPS = st.lists(st.one_of(_REGISTER, _REGISTER, _DELETE), min_size=1, max_size=15)
_numbers = itertools.count()


class Model:
    """The concepts of one model."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.taken: dict[str, Words] = {}
        self.last: dict[int, tuple[str, int]] = {}

    def register(
        self, name: str, seed: int, description: str, labels: dict[str, str], *, replace: bool, expected: int | None
    ) -> object:
        current = self.taken.get(name)
        if current is not None and current[1] == seed and (not replace or current[2:] == (description, labels)):
            return current, False
        number = 0 if current is None else current[0]
        if expected is not None and expected != number:
            return VersionMismatchError, number
        if current is not None and not replace:
            return NameTakenError, number
        self.counts[name] = self.counts.get(name, 0) + 1
        self.taken[name] = (self.counts[name], seed, description, labels)
        self.last[seed] = (name, self.counts[name])
        return self.taken[name], True

    def delete(self, name: str, expected: int | None) -> object:
        current = self.taken.get(name)
        if current is not None and expected not in {None, current[0]}:
            return VersionMismatchError, current[0]
        return self.taken.pop(name, None)


class Subject:
    """The same in a store, under a model's name of its own."""

    def __init__(self, store: ConceptStore) -> None:
        self._store = store
        self._model = f"model{next(_numbers)}"
        self._ids = [digest(self._model, seed) for seed in range(3)]

    async def do(self, step: dict[str, Any]) -> object:
        """Register or delete; what came of it, as `Model` says it."""
        try:
            if "seed" not in step:
                return self._words(await self._store.delete(self._model, step["name"], step["expected"]))
            stored, created = await self._store.register(
                Registration(
                    model=self._model,
                    name=step["name"],
                    content=content(step["seed"], id=self._ids[step["seed"]]),
                    description=step["description"],
                    labels=step["labels"],
                    replace=step["replace"],
                    expected_version=step["expected"],
                )
            )
        except VersionMismatchError as error:
            return VersionMismatchError, error.current
        except NameTakenError as error:
            return NameTakenError, error.newest.number
        else:
            return self._words(stored.version), created

    async def newest(self, name: str) -> list[Words | None]:
        """What it says of a name, both ways."""
        stored = await self._store.by_name(self._model, name)
        return [self._words(await self._store.newest(self._model, name)), self._words(stored and stored.version)]

    async def page(self, labels: dict[str, str]) -> list[str]:
        page = await self._store.page(model=self._model, labels=labels, after=None, limit=10)
        return [version.name for version in page]

    async def last(self, seed: int) -> tuple[str, int] | None:
        """What it says of a content's id."""
        stored = await self._store.by_id(self._ids[seed])
        return None if stored is None else (stored.version.name, stored.version.number)

    def _words(self, version: Version | None) -> Words | None:
        if version is None:
            return None
        return version.number, self._ids.index(version.facts.id), version.description, dict(version.labels)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_STEPS)
async def test_it_does_what_a_dict_would(store: ConceptStore, steps: list[dict[str, Any]]) -> None:
    expected, subject = Model(), Subject(store)
    for step in steps:
        wanted = expected.register(**step) if "seed" in step else expected.delete(**step)
        assert await subject.do(step) == wanted
        for name in _NAMES:
            assert await subject.newest(name) == [expected.taken.get(name)] * 2
        for labels in ({}, {"k": "v"}, {"k": "v", "l": ""}):
            names = [name for name, its in expected.taken.items() if labels.items() <= its[3].items()]
            assert await subject.page(labels) == sorted(names)
        for seed in range(3):
            assert await subject.last(seed) == expected.last.get(seed)
