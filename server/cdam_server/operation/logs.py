"""Structured logs: for people on a terminal, JSON elsewhere."""

import logging
import sys
from typing import Literal

import structlog


def configure(form: Literal["auto", "console", "json"], level: str) -> None:
    """Send every log line to stderr in the form asked for."""
    console = sys.stderr.isatty() if form == "auto" else form == "console"
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *(
                [
                    structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
                ]  # a rich one takes seconds
                if console
                else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
