"""Structured logs: a line is an event in words, and its context as keys. JSON in a file, for people on a terminal.

What libraries log with the standard library takes the same way out.
"""

import logging
import logging.handlers
import sys
from pathlib import Path

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from engine.limits import LOG_BYTES_MAX, LOG_FILES_OLD_MAX

structlog.configure(
    processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
    wrapper_class=structlog.stdlib.BoundLogger,
    logger_factory=structlog.stdlib.LoggerFactory(),
    cache_logger_on_first_use=True,
)

get_logger = structlog.stdlib.get_logger


def log_to_file(path: Path, level: str, **context: object) -> None:
    """Log to a file of this process's own, which does not grow for ever. `context` stands in each line."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES_MAX, backupCount=LOG_FILES_OLD_MAX)
    handler.setFormatter(json_lines(**context))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("picows").setLevel(logging.WARNING)
    # It tells at length of each connection that it lost; we say ourselves that Postgres is away.
    logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)


def log_to_terminal() -> None:
    """Log what people should know to standard error."""
    handler = logging.StreamHandler()
    for_people = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    handler.setFormatter(_formatter([for_people]))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def json_lines(**context: object) -> logging.Formatter:
    """What makes a record a JSON object, which holds the `context` as well."""
    # No values of local variables stand in these tracebacks: some are secrets.
    to_text = structlog.processors.format_exc_info
    return _formatter([_adding(context), to_text, structlog.processors.JSONRenderer(default=str, ensure_ascii=False)])


def _formatter(last: list[Processor]) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.ExtraAdder(),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _without_what_libraries_add,
            *last,
        ]
    )


def _adding(context: dict[str, object]) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**context, **event}

    return add


def _without_what_libraries_add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    # Ray adds times of its own to each record, and uvicorn its sentences once more, in colours.
    return {key: value for key, value in event.items() if not key.startswith("_") and key != "color_message"}
