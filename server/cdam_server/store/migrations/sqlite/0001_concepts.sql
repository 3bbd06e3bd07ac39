-- Text compares by code point (BINARY, of UTF-8). Times are ISO 8601 in UTC, to the microsecond.

CREATE TABLE contents (
    id TEXT NOT NULL PRIMARY KEY,
    model_fingerprint TEXT NOT NULL,
    resize TEXT NOT NULL,
    input_height INTEGER,
    input_width INTEGER,
    example_count INTEGER NOT NULL,
    negative_count INTEGER NOT NULL,
    spread REAL,
    content_digest TEXT NOT NULL,
    imported INTEGER NOT NULL CHECK (imported IN (0, 1)),
    checksum INTEGER NOT NULL, -- CRC-32 of all else; see records.py
    vector BLOB NOT NULL,      -- float32, little-endian
    examples TEXT NOT NULL,    -- JSON: [[digest, cosine], ...]
    negatives TEXT NOT NULL    -- likewise
) STRICT;

CREATE TABLE versions (
    sequence INTEGER NOT NULL PRIMARY KEY, -- the order in which they were stored
    model TEXT NOT NULL,
    name TEXT NOT NULL,
    number INTEGER NOT NULL CHECK (number > 0),
    description TEXT NOT NULL,
    labels TEXT NOT NULL, -- JSON object of strings
    create_time TEXT NOT NULL,
    content_id TEXT NOT NULL REFERENCES contents (id),
    UNIQUE (model, name, number)
) STRICT;

CREATE INDEX versions_of_content ON versions (content_id, sequence);

-- Every name that ever was: how far it has counted, and whether it is taken now.
CREATE TABLE names (
    model TEXT NOT NULL,
    name TEXT NOT NULL,
    newest INTEGER NOT NULL,
    taken INTEGER NOT NULL CHECK (taken IN (0, 1)),
    PRIMARY KEY (model, name)
) STRICT, WITHOUT ROWID;

-- To find taken names by the labels of their newest versions: SHA-256 of key and value, which may be of any length.
CREATE TABLE labels (
    digest TEXT NOT NULL,
    model TEXT NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (digest, model, name)
) STRICT, WITHOUT ROWID;

CREATE INDEX labels_of_name ON labels (model, name);
