"""The one error of everything between settings and a model."""

from __future__ import annotations

from collections.abc import Iterable


class LoadError(ValueError):
    """A model can't be loaded as its settings say.

    Attributes:
        setting: The setting to look at.
        message: What was found, and what to do.
    """

    def __init__(self, setting: str, message: str, *, model: str | None = None) -> None:
        super().__init__(f"model {model!r}: {setting}: {message}" if model else f"{setting}: {message}")
        self.setting = setting
        self.message = message


def few(names: Iterable[str], most: int = 5) -> str:
    """Some of many names, for a message of one line."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def reason(error: BaseException) -> str:
    """The first line of an error, cut short: torch and timm put whole manuals into theirs."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"
