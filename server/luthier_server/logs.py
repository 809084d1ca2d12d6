"""structlog: lines for people in a terminal, JSON everywhere else."""

import contextlib
import logging
import re
import sys
from typing import TextIO, cast

import structlog

_BEARER = re.compile(r"(bearer\s+)[A-Za-z0-9._~+/=-]+", re.IGNORECASE)


def redact(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Takes bearer tokens out of every value. Nothing logs one; this is for texts of others, such as tracebacks."""
    return {
        key: _BEARER.sub(r"\1[redacted]", value) if isinstance(value, str) else value for key, value in event.items()
    }


class _Lossy:
    """A stream that loses what it cannot write: a log on a full disk must not stop what is logged."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def configure(level: str) -> None:
    """Logs to standard error, from `level` on."""
    terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        # The formatter of a machine with rich would print the local variables of every frame, tokens and all.
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if terminal
        else structlog.processors.JSONRenderer()
    )
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if terminal else "iso", utc=not terminal),
        *([] if terminal else [structlog.processors.format_exc_info]),
        redact,
        renderer,
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Lossy(sys.stderr))),
        cache_logger_on_first_use=True,
    )
