"""Which images the command line means by files, folders and patterns."""

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import click

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp"})


def find_images(words: Iterable[str]) -> list[Path]:
    """The files, each once: those that are named, those below folders, and those that a pattern (``*``, ``**``) finds.

    Raises:
        click.UsageError: if a word means none.
    """
    found: dict[Path, None] = {}
    for word in words:
        files = _files(word)
        if not files:
            what = "no JPEG, PNG or WebP file below this folder" if Path(word).is_dir() else "no such file"
            raise click.UsageError(f"{word}: {what}")
        found.update(dict.fromkeys(files))
    return list(found)


def _files(word: str) -> list[Path]:
    if Path(word).exists():
        return _below(Path(word))
    return [file for path in sorted(glob.glob(word, recursive=True)) for file in _below(Path(path))]  # noqa: PTH207


def _below(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
