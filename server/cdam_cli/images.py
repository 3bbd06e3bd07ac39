"""Which files the command line means by names, folders and patterns: one walk for all commands.

Below a folder nothing hidden is found, as `cdam_images.folders` says. What is named is taken, hidden or not. A file
counts once, by whatever names and links it is reached.
"""

import glob
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from cdam_images.folders import begins_like_image, is_shown, once, walk

_NAMED: Final = 16


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        images: Files, each once: those that are named, those below folders, and those that a pattern finds.
        left_out: Files below folders that are no images by their suffixes.
    """

    images: Sequence[Path]
    left_out: Sequence[Path]


def find_images(words: Iterable[str]) -> Found:
    """The files that are meant by names, folders and patterns (``*``, ``**``).

    Raises:
        click.UsageError: if a word means none.
    """
    found: list[Path] = []
    left_out: list[Path] = []
    for word in words:
        files, others = _files(word)
        if not files:
            raise click.UsageError(f"{word}: {_nothing(word)}")
        found += files
        left_out += others
    images = once(found)
    return Found(images, once(images + left_out)[len(images) :])


def tell_left_out(others: Sequence[Path]) -> None:
    """Say which files below folders are no images."""
    if others:
        are = "1 file that is" if len(others) == 1 else f"{len(others)} files that are"
        click.echo(f"left out: {are} no JPEG, PNG or WebP: {some(others)}", err=True)


def digests(files: Sequence[Path]) -> dict[Path, str]:
    """The SHA-256 of each file, by which a server knows its image.

    Raises:
        click.ClickException: if some can't be images, by their first bytes; it names them all.
    """
    found: dict[Path, str] = {}
    wrong: list[str] = []
    for file in files:
        try:
            data = file.read_bytes()
            if begins_like_image(data):
                found[file] = hashlib.sha256(data).hexdigest()
            else:
                wrong.append(str(file))
        except OSError as error:
            wrong.append(f"{file} ({error.strerror})")
    if wrong:
        raise click.ClickException(f"can't be read as JPEG, PNG or WebP: {some(wrong, _NAMED)}; nothing was registered")
    return found


def some(names: Sequence[object], most: int = 5) -> str:
    """The first of many names."""
    return ", ".join(map(str, names[:most])) + (f", and {len(names) - most} more" if len(names) > most else "")


def _files(word: str) -> tuple[list[Path], list[Path]]:
    if Path(word).exists():
        return _below(Path(word))
    named = set(Path(word).parts)
    found = (Path(path) for path in sorted(glob.glob(word, recursive=True)))  # noqa: PTH207
    sides = [_below(path) for path in found if all(part in named or is_shown(part) for part in path.parts)]
    return [file for files, _ in sides for file in files], [file for _, others in sides for file in others]


def _below(path: Path) -> tuple[list[Path], list[Path]]:
    """Images, and other files; a file that is named counts as an image."""
    return walk(path) if path.is_dir() else ([path], [])


def _nothing(word: str) -> str:
    if Path(word).is_dir():
        return "no JPEG, PNG or WebP file below this folder"
    return "matches no file" if glob.has_magic(word) else "no such file or folder"
