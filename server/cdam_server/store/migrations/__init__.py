"""Numbered SQL files, one folder a database: each takes the schema from the number before to its own.

A released file is never edited; what is to change comes as the next number.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Literal

Database = Literal["sqlite", "postgres"]


@dataclass(frozen=True)
class Migration:
    """A step of the schema.

    Attributes:
        number: From 1, without gaps; the schema's version when it has been applied.
        sql: Its statements.
    """

    number: int
    sql: str


def migrations(database: Database) -> tuple[Migration, ...]:
    """All steps of a database's schema, in order."""
    files = sorted(
        (file for file in (resources.files(__name__) / database).iterdir() if file.name.endswith(".sql")),
        key=lambda file: file.name,
    )
    found = tuple(Migration(int(file.name.partition("_")[0]), file.read_text("utf-8")) for file in files)
    if [step.number for step in found] != list(range(1, len(found) + 1)):
        raise RuntimeError(f"the migrations of {database} are not numbered from 1 without gaps")
    return found
