"""Which images the command line means by files, folders and patterns."""

import glob
import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import click
from PIL import Image

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_FORMATS: Final = ("JPEG", "PNG", "WEBP")
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
    found: dict[Path, None] = {}
    left_out: dict[Path, None] = {}
    for word in words:
        files, others = _files(word)
        if not files:
            raise click.UsageError(f"{word}: {_nothing(word)}")
        found.update(dict.fromkeys(files))
        left_out.update(dict.fromkeys(others))
    return Found(list(found), [file for file in left_out if file not in found])


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
            Image.open(BytesIO(data), formats=_FORMATS).close()  # reads the header alone
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
    sides = [_below(Path(path)) for path in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
    return [file for files, _ in sides for file in files], [file for _, others in sides for file in others]


def _below(path: Path) -> tuple[list[Path], list[Path]]:
    """Images, and other files; a file that is named counts as an image."""
    if not path.is_dir():
        return [path], []
    files = sorted(file for file in path.rglob("*") if file.is_file())
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    return images, [file for file in files if file.suffix.lower() not in SUFFIXES]


def _nothing(word: str) -> str:
    if Path(word).is_dir():
        return "no JPEG, PNG or WebP file below this folder"
    return "matches no file" if glob.has_magic(word) else "no such file or folder"
