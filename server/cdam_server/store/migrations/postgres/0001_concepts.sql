-- Text is ordered by code point (COLLATE "C", of UTF-8), as SQLite does.

CREATE TABLE cdam.contents (
    id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    model_fingerprint TEXT NOT NULL,
    resize TEXT NOT NULL,
    input_height BIGINT,
    input_width BIGINT,
    example_count BIGINT NOT NULL,
    negative_count BIGINT NOT NULL,
    spread DOUBLE PRECISION,
    content_digest TEXT NOT NULL,
    imported BOOLEAN NOT NULL,
    checksum BIGINT NOT NULL, -- CRC-32 of all else; see records.py
    vector BYTEA NOT NULL,    -- float32, little-endian
    examples TEXT NOT NULL,   -- JSON: [[digest, cosine], ...]
    negatives TEXT NOT NULL   -- likewise
);

CREATE TABLE cdam.versions (
    sequence BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- the order in which they were stored
    model TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    number BIGINT NOT NULL CHECK (number > 0),
    description TEXT NOT NULL,
    labels TEXT NOT NULL, -- JSON object of strings
    create_time TIMESTAMPTZ NOT NULL,
    content_id TEXT COLLATE "C" NOT NULL REFERENCES cdam.contents (id),
    UNIQUE (model, name, number)
);

CREATE INDEX versions_of_content ON cdam.versions (content_id, sequence);

-- Every name that ever was: how far it has counted, and whether it is taken now.
CREATE TABLE cdam.names (
    model TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    newest BIGINT NOT NULL,
    taken BOOLEAN NOT NULL,
    PRIMARY KEY (model, name)
);

-- To find taken names by the labels of their newest versions: SHA-256 of key and value, which may be of any length.
CREATE TABLE cdam.labels (
    digest TEXT COLLATE "C" NOT NULL,
    model TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (digest, model, name)
);

CREATE INDEX labels_of_name ON cdam.labels (model, name);
