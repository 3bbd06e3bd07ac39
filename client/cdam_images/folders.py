"""Which files below a folder are images, and whether a file begins like one: the same for every command.

Below a folder nothing hidden is found: no file or folder whose name begins with a dot, such as the ``._photo.jpg`` of
macOS, ``.DS_Store`` and ``.ipynb_checkpoints``, and nothing that systems add of themselves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image

from cdam_images.files import find_picture

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_FORMATS: Final = ("JPEG", "PNG", "WEBP")
# In lower case: of Windows, of archives made on macOS, of network drives (thumbnails, which are images).
_OF_SYSTEMS: Final = frozenset({"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "@eadir"})


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


def is_shown(name: str) -> bool:
    """Whether a file or folder of this name, below another, is anything that people put there."""
    return not name.startswith(".") and name.lower() not in _OF_SYSTEMS


def begins_like_image(data: bytes) -> bool:
    """Whether a file's content begins like a JPEG, PNG or WebP image; its pixels are not decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.open(BytesIO(find_picture(data).data), formats=_FORMATS).close()  # reads the header alone
    except Image.DecompressionBombError:
        return True  # how large it may be, its user says
    except (OSError, SyntaxError, ValueError):
        return False
    return True
