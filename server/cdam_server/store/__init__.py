"""Where registered concepts are kept."""

from cdam_server.store.protocol import (
    ConceptStore,
    Content,
    Example,
    Facts,
    NameTakenError,
    Registration,
    StoreBusyError,
    StoredConcept,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnusableError,
    StoreUnwritableError,
    Version,
    VersionMismatchError,
)

__all__ = [
    "ConceptStore",
    "Content",
    "Example",
    "Facts",
    "NameTakenError",
    "Registration",
    "StoreBusyError",
    "StoreError",
    "StoreFullError",
    "StoreUnavailableError",
    "StoreUnusableError",
    "StoreUnwritableError",
    "StoredConcept",
    "Version",
    "VersionMismatchError",
]
