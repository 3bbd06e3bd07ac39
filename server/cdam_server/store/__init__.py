"""Where registered concepts are kept."""

from cdam_server.store.protocol import (
    ConceptFacts,
    ConceptStore,
    Content,
    Example,
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
    "ConceptFacts",
    "ConceptStore",
    "Content",
    "Example",
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
