"""Which files the command line means by names, folders and patterns: one walk for all commands.

Below a folder nothing hidden is found: no file or folder whose name begins with a dot, such as the ``._photo.jpg`` of
macOS, ``.DS_Store`` and ``.ipynb_checkpoints``, and nothing that systems add of themselves. What is named is taken,
hidden or not. A file counts once, by whatever names and links it is reached.
"""

import glob
import hashlib
import os
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import click
from PIL import Image

from cdam_images.files import find_picture

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_FORMATS: Final = ("JPEG", "PNG", "WEBP")
# In lower case: of Windows, of archives made on macOS, of network drives (thumbnails, which are images).
_OF_SYSTEMS: Final = frozenset({"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "@eadir"})
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


def walk(folder: Path, suffixes: Collection[str] = SUFFIXES) -> tuple[list[Path], list[Path]]:
    """Files of some suffixes below a folder, and other files; sorted, each once, nothing hidden.

    Args:
        folder: The folder, hidden or not; links to other folders below it are not followed.
        suffixes: In lower case.
    """
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = filter(is_shown, folders)
        files += (Path(parent, name) for name in names if is_shown(name))
    files = once(sorted(file for file in files if file.is_file()))
    wanted = [file for file in files if file.suffix.lower() in suffixes]
    return wanted, [file for file in files if file.suffix.lower() not in suffixes]


def once(files: Iterable[Path]) -> list[Path]:
    """Each file by the first of its names."""
    found: dict[Path, Path] = {}
    for file in files:
        found.setdefault(file.resolve(), file)
    return list(found.values())


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
            if _is_image(data):
                found[file] = hashlib.sha256(data).hexdigest()
            else:
                wrong.append(str(file))
        except OSError as error:
            wrong.append(f"{file} ({error.strerror})")
    if wrong:
        raise click.ClickException(f"can't be read as JPEG, PNG or WebP: {some(wrong, _NAMED)}; nothing was registered")
    return found


def _is_image(data: bytes) -> bool:
    """Whether this begins like an image; the server looks at the rest."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.open(BytesIO(find_picture(data).data), formats=_FORMATS).close()  # reads the header alone
    except Image.DecompressionBombError:
        return True  # how large it may be is the server's business
    except (OSError, SyntaxError, ValueError):
        return False
    return True


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


def is_shown(name: str) -> bool:
    """Whether a file or folder of this name, below another, is anything that people put there."""
    return not name.startswith(".") and name.lower() not in _OF_SYSTEMS


def _nothing(word: str) -> str:
    if Path(word).is_dir():
        return "no JPEG, PNG or WebP file below this folder"
    return "matches no file" if glob.has_magic(word) else "no such file or folder"
