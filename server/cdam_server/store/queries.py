"""The store's SQL, for every database.

Written so that SQLite and PostgreSQL both understand it, but for two spellings, which `postgres.py` and `sqlite.py` see
to: parameters are `:name`, and tables stand in the schema `cdam`, which SQLite has none of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

VERSION: Final = """
    v.model, v.name, v.number, v.description, v.labels, v.create_time,
    c.id, c.model_fingerprint, c.resize, c.input_height, c.input_width,
    c.example_count, c.negative_count, c.spread, c.content_digest, c.imported
"""
CONCEPT: Final = f"{VERSION}, c.checksum, c.vector, c.examples, c.negatives"

_NEWEST: Final = """
    JOIN cdam.versions v ON v.model = n.model AND v.name = n.name AND v.number = n.newest
    JOIN cdam.contents c ON c.id = v.content_id
"""
_OF_NAME: Final = f"FROM cdam.names n {_NEWEST} WHERE n.model = :model AND n.name = :name AND n.taken"

NEWEST: Final = f"SELECT {VERSION} {_OF_NAME}"

BY_NAME: Final = f"SELECT {CONCEPT} {_OF_NAME}"

_OF_ID: Final = """
    FROM cdam.versions v JOIN cdam.contents c ON c.id = v.content_id
    WHERE v.content_id = :id ORDER BY v.sequence DESC LIMIT 1
"""
BY_ID: Final = f"SELECT {CONCEPT} {_OF_ID}"

# Makes other writers of this name wait until the transaction is over, also if nobody has used the name before.
LOCK: Final = """
    INSERT INTO cdam.names (model, name, newest, taken) VALUES (:model, :name, 0, false)
    ON CONFLICT (model, name) DO UPDATE SET newest = names.newest
"""

# The same for a name that is used; without making one that is not.
LOCK_USED: Final = "UPDATE cdam.names SET newest = newest WHERE model = :model AND name = :name"

COUNT: Final = "SELECT newest FROM cdam.names WHERE model = :model AND name = :name"

INSERT_CONTENT: Final = """
    INSERT INTO cdam.contents (
        id, model_fingerprint, resize, input_height, input_width, example_count, negative_count, spread,
        content_digest, imported, checksum, vector, examples, negatives
    ) VALUES (
        :id, :model_fingerprint, :resize, :input_height, :input_width, :example_count, :negative_count, :spread,
        :content_digest, :imported, :checksum, :vector, :examples, :negatives
    ) ON CONFLICT (id) DO NOTHING
"""

INSERT_VERSION: Final = """
    INSERT INTO cdam.versions (model, name, number, description, labels, create_time, content_id)
    VALUES (:model, :name, :number, :description, :labels, :create_time, :content_id)
"""

TAKE: Final = "UPDATE cdam.names SET newest = :number, taken = true WHERE model = :model AND name = :name"

FREE: Final = "UPDATE cdam.names SET taken = false WHERE model = :model AND name = :name"

INSERT_LABEL: Final = "INSERT INTO cdam.labels (digest, model, name) VALUES (:digest, :model, :name)"

DELETE_LABELS: Final = "DELETE FROM cdam.labels WHERE model = :model AND name = :name"

_KEYS: Final = "SELECT k.model, k.name FROM {source} WHERE {conditions} ORDER BY k.model, k.name LIMIT :limit"
_OF_KEYS: Final = f"""
    FROM ({_KEYS}) p JOIN cdam.names n ON n.model = p.model AND n.name = p.name {_NEWEST} ORDER BY n.model, n.name
"""
_PAGE: Final = f"SELECT {VERSION} {_OF_KEYS}"
_ALSO: Final = """EXISTS (
    SELECT 1 FROM cdam.labels m WHERE m.digest = :label{number} AND m.model = k.model AND m.name = k.name
)"""


def page(
    *, model: str, label_digests: Sequence[str], after: tuple[str, str] | None, limit: int
) -> tuple[str, dict[str, Any]]:
    """The query of a page, and its parameters.

    The keys come first, from one index, in order, from where the page begins on: that of the names, or that of the labels,
    which has taken names only. What belongs to them is joined when they are few, whatever the planner knows of the tables.
    """
    parameters: dict[str, Any] = {"limit": limit}
    conditions = []
    for number, digest in enumerate(label_digests):
        parameters[f"label{number}"] = digest
        conditions.append(_ALSO.format(number=number) if number else "k.digest = :label0")
    if not label_digests:
        conditions.append("k.taken")
    if model:
        parameters["model"] = model
        conditions.append("k.model = :model")
    if after is not None:
        parameters["after_model"], parameters["after_name"] = after
        same_model = after[0] == model
        conditions.append("k.name > :after_name" if same_model else "(k.model, k.name) > (:after_model, :after_name)")
    source = "cdam.labels k" if label_digests else "cdam.names k"
    return _PAGE.format(source=source, conditions=" AND ".join(conditions)), parameters
