"""What the engine refuses.

ValueError
└── UnsupportedError
    ├── UnsupportedArchitectureError  the model can't be explained at all
    └── UnsupportedMethodError        this method is not defined for the model
"""

from __future__ import annotations


class UnsupportedError(ValueError):
    """Base of both.

    Attributes:
        reason: UPPER_SNAKE_CASE, stable, for programs.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnsupportedArchitectureError(UnsupportedError):
    """CDAM is not defined for this architecture, or the engine does not know its code."""


class UnsupportedMethodError(UnsupportedError):
    """The method is not defined for this model, or the engine does not know the code that it needs."""
