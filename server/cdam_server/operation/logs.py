"""Structured logs: for people on a terminal, JSON elsewhere."""

import json
import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import structlog


def configure(form: Literal["auto", "console", "json"], level: str, **always: object) -> None:
    """Send every log line to stderr in the form asked for, with the facts that are always true."""
    logger = structlog.WriteLogger(sys.stderr)
    console = sys.stderr.isatty() if form == "auto" else form == "console"
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            lambda _, __, event: {**always, **event},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *(
                [
                    structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
                ]  # a rich one takes seconds
                if console
                else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_json)]
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_: logger,
        cache_logger_on_first_use=False,
    )


def _json(event: dict[str, Any], default: Callable[[Any], Any]) -> str:
    return _encoder(default).encode(event)


@cache
def _encoder(default: Callable[[Any], Any]) -> json.JSONEncoder:
    """What `json.dumps` makes anew for each line."""
    return json.JSONEncoder(default=default)
