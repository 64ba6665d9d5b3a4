"""Log of the server: one JSON object per line.

The log contains sizes, times and outcomes, and never a prompt, a completion, a header or an unknown path.
"""

from __future__ import annotations

import contextvars
import json
import logging
import time
import traceback
from typing import Any

logger = logging.getLogger("recursify.server")

log_fields: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("fields of the current request's log entry")


class JsonFormatter(logging.Formatter):
    """Formats a record as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line)


def log_event(level: str, event: str, *, exception: BaseException | None = None, **fields: Any) -> None:
    """Log ``event`` with ``fields``."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logger.log(number, event, extra={"fields": fields}, exc_info=exception)


def add_log_fields(**fields: Any) -> None:
    """Add fields to the log entry of the current request."""
    log_fields.get({}).update(fields)


def request_id() -> str:
    """Return the id of the current request."""
    return log_fields.get()["id"]
