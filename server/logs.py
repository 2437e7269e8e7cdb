"""Logging: the process' log as text or JSON, one line a record, and the line of each request.

Never prompts, answers, pictures or keys. Does not cover what others log on the way.
"""

import logging
import math
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from server.record import RequestRecord

log = logging.getLogger("deshift.requests")
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})  # asked again and again by machines
LogFormat = Literal["text", "json"]


def configure_logging(log_format: LogFormat = "text") -> None:
    """Send every record to stderr: the libraries' too, Python's warnings, what nobody caught."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    if log_format == "json":
        _quieten_model_libraries()


class TextLines(logging.Formatter):
    """`time level logger message`; the lines of a traceback are indented, so that none of them can
    be taken for a record.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        lines = [f"{_timestamp(record)} {record.levelname} {record.name} {message}"]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        if record.stack_info:
            lines += record.stack_info.splitlines()
        return "\n    ".join(map(_printable, lines))


class JsonLines(JsonFormatter):
    """One object a line, in ASCII: what else a text may hold is escaped."""

    def __init__(self) -> None:
        super().__init__(
            ["asctime", "levelname", "name", "message"],
            rename_fields={
                "asctime": "timestamp",
                "levelname": "level",
                "name": "logger",
                "exc_info": "exception",
                "stack_info": "stack",
            },
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's: the message, in colours
        )

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        del datefmt
        return _timestamp(record)

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        super().add_fields(log_data, record, message_dict)
        line: object = record.msg
        if isinstance(line, RequestLine):
            log_data["message"] = line.summary
            log_data.update(line.fields)


class RequestLine:
    """The message of a request's log record; each format takes from it what it shows."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._seconds = (record.ended_at or record.started) - record.started

    @property
    def summary(self) -> str:
        record = self._record
        return f"{record.method} {record.path} {record.status}"

    def __str__(self) -> str:
        """Values without spaces, or quoted: none can be taken for another field."""
        record, principal = self._record, self._record.principal
        told = {
            "request_id": record.request_id,
            "tenant": principal.tenant if principal else "-",
            "key": (principal.key_id if principal else "") or "-",
            "method": ascii(record.method)[1:-1],
            "path": ascii(record.path),
            "status": record.status,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "steering": record.steered.log_value if record.steered else "-",
            "seconds": f"{self._seconds:.3f}",
        }
        told |= {
            name: value
            for name, value in (("failure", record.failure), ("trace_id", record.trace_id))
            if value is not None
        }
        return " ".join(f"{name}={value}" for name, value in told.items())

    @property
    def fields(self) -> dict[str, Any]:
        """For JSON; what is not known of this request is left out."""
        record, principal = self._record, self._record.principal
        fields = {
            "request_id": record.request_id,
            "trace_id": record.trace_id,
            "tenant": record.tenant,
            "key": (principal.key_id if principal else "") or None,
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "failure": record.failure,
            "seconds": round(self._seconds, 6),
            # A copy: a picture that is still decoded for a client that left adds to them.
            "stages_ms": {name: _ms(s) for name, s in dict(record.stages).items()} or None,
        }
        if record.is_chat:
            fields |= self._chat_fields()
        return {name: value for name, value in fields.items() if value is not None}

    def _chat_fields(self) -> dict[str, Any]:
        record = self._record
        fields: dict[str, Any] = {
            "has_images": record.has_images,
            "is_streamed": record.is_streamed,
            "projection": _finite(record.projection),
        }
        if record.steered is not None:
            fields["steering"] = steering_fields(record)
        if record.timings is not None:
            fields |= {
                "prompt_tokens": record.prompt_tokens,
                "completion_tokens": record.completion_tokens,
                "cached_tokens": record.cached_tokens,
                "queue_ms": _ms(record.timings.queue_s),
                "ttft_ms": _ms(record.timings.time_to_first_token_s),
            }
        if record.timings is not None and record.steered is not None:
            fields["overhead_ms"] = _ms(record.steered.overhead(record.timings).total_s)
        return fields


def steering_fields(record: RequestRecord) -> dict[str, str | float | int]:
    """What was subtracted from this request's hidden states, in the words of its answer."""
    assert record.steered is not None
    plan = record.steered.plan
    fields: dict[str, str | float | int | None] = {
        "mode": plan.mode if plan.is_active else "off",
        "method": plan.method if plan.is_active else None,
        "alpha": record.steered.alpha,
        "gate_opening": record.steered.opening,
        "vector": plan.vector_id if plan.is_active else None,
        "corruption": plan.corruption_in_force,
        "revision": plan.revision,
        "relative_dose": _finite(record.steered.relative_dose),
        "reason": plan.reason,
    }
    return {name: value for name, value in fields.items() if value is not None}


def log_request(record: RequestRecord) -> None:
    """An observer of requests."""
    level = logging.DEBUG if record.path in OPEN_PATHS else logging.INFO
    log.log(level, RequestLine(record))


def _timestamp(record: logging.LogRecord) -> str:
    """RFC 3339, in UTC."""
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _printable(text: str) -> str:
    """Escapes line ends and whatever else a terminal may obey or hide."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return round(value, 6) if value is not None and math.isfinite(value) else None


def _quieten_model_libraries() -> None:
    """They draw progress bars and write past the log: no bars, and records like everybody's."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers

    disable_progress_bars()
    logging.getLogger("huggingface_hub").handlers.clear()
    transformers.disable_progress_bar()
    transformers.disable_default_handler()
    transformers.enable_propagation()


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logging.getLogger("deshift").critical("ended by an error", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(failed: threading.ExceptHookArgs) -> None:
    name = failed.thread.name if failed.thread else "?"
    error = failed.exc_value or failed.exc_type()
    logging.getLogger("deshift").critical("thread %s ended by an error", name, exc_info=error)
