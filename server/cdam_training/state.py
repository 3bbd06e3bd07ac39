"""What a training needs to go on after it was interrupted, in a file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cdam_server.settings.load_error import LoadError
from cdam_training.files import replace_file


class State:
    """A file of tensors and numbers, and of what decides them.

    Args:
        file: The file; it need not be there.
        key: What decides the result. Must be representable in JSON.
    """

    def __init__(self, file: Path, key: Mapping[str, Any]) -> None:
        self._file = file
        self._key = json.loads(json.dumps({**key, "torch": torch.__version__}))

    def with_key(self, **more: Any) -> State:
        """The same file, for a result that more decides."""
        return State(self._file, {**self._key, **more})

    def save(self, content: Mapping[str, Any]) -> None:
        """Keep it, in the place of what was kept.

        Raises:
            LoadError: The disk is full, or nothing may be written there.
        """
        whole = {"key": json.dumps(self._key), **content}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch says nothing of a full disk
        torch.save(whole, buffer)
        try:
            replace_file(self._file, lambda partial: partial.write_bytes(buffer.getbuffer()))
        except OSError as error:
            raise LoadError("work", f"{self._file} can't be written: {error.strerror}") from error

    def load(self) -> Mapping[str, Any] | None:
        """What was kept; None if nothing was.

        Raises:
            LoadError: It is of another training, or damaged.
        """
        if not self._file.exists():
            return None
        try:
            content: dict[str, Any] = torch.load(self._file, weights_only=True, map_location="cpu")
            theirs = json.loads(content.pop("key"))
        except Exception as error:
            raise LoadError("work", f"{self._file} is damaged: remove it, or begin anew with --overwrite") from error
        others = sorted(name for name in theirs.keys() | self._key.keys() if theirs.get(name) != self._key.get(name))
        if others:
            raise LoadError(
                "work",
                f"{self._file.parent} holds a training with another {', '.join(others)}: name another folder, or begin "
                "anew with --overwrite",
            )
        return content
