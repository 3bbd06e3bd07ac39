"""What the parts of `gpu` have in common: their arguments, their time, and where their rows go."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from time import monotonic
from typing import Any


class Rows:
    """A part's rows, written one by one so that nothing is lost, and the time that is left to it.

    Args:
        name: Of the part, for its help.
        more: Its own arguments, with what argparse is told of each.

    Attributes:
        arguments: What the command line says.
    """

    def __init__(self, name: str, **more: dict[str, Any]) -> None:
        parser = argparse.ArgumentParser(description=name)
        for argument, options in more.items():
            parser.add_argument(argument if options.pop("positional", False) else f"--{argument}", **options)
        parser.add_argument("--device", default="cuda")
        parser.add_argument("--quick", action="store_true")
        parser.add_argument("--seconds", type=float, default=60)
        parser.add_argument("--rows", type=Path, required=True)
        self.arguments = parser.parse_args()
        self._until = monotonic() + self.arguments.seconds
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("out of time"))  # by way of every `finally`

    def left(self) -> float:
        """Seconds."""
        return self._until - monotonic()

    def add(self, **row: Any) -> None:
        """Keep a row."""
        with self.arguments.rows.open("a") as file:
            file.write(json.dumps({key.replace("_", " "): value for key, value in row.items()}) + "\n")
