"""Logs: structlog for the product and for the libraries it stands on, readable on a terminal, JSON elsewhere.

Whatever is logged passes `_redact` and `_without_messages` on its way out: what a customer wrote stays out of the
log even where somebody forgets that.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Final

import structlog
from opentelemetry import trace
from temporalio import workflow

from app.errors import TrellisError

if TYPE_CHECKING:
    from types import TracebackType

    from app.settings import Settings

EventDict = MutableMapping[str, Any]

#: Keys whose values are never logged, at any depth.
PERSONAL: Final = frozenset(
    {
        *("address", "address_json", "line1", "line2", "city", "zip", "postcode", "name", "email", "phone"),
        *("note", "approval_note", "payload", "body", "headers", "args", "input", "customer_id"),
        *("payment_id", "payment", "reference", "provider_reference", "refund_reference", "tracking"),
        *("authorization", "cookie", "api_key", "password", "secret", "token", "database_url", "dsn"),
    }
)
REDACTED: Final = "[redacted]"

#: Frames of a stack that are logged, the innermost ones.
_FRAMES: Final = 30


def configure_logging(settings: Settings) -> None:
    """Send structlog and the standard library's loggers to standard error, in one format. Call it once."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _add_trace,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(), _flatten_extra, *shared],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _without_messages,
            _redact,
            renderer,
        ],
    )
    # No line of ours says where in the source it was written, and to find that out the stack is walked for each;
    # this is the documented way to leave it.
    logging._srcfile = None  # noqa: SLF001
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    _configure_libraries()


def _configure_libraries() -> None:
    logging.captureWarnings(capture=True)
    # What is in the fields need not be in the message as well.
    workflow.logger.workflow_info_on_message = False
    for chatty in ("httpx", "httpcore", "alembic.runtime.plugins", "asyncio"):
        logging.getLogger(chatty).setLevel("WARNING")
    # Our canonical line tells of a failed attempt, once and without the payload that the SDK's would add.
    logging.getLogger("temporalio.activity").setLevel("CRITICAL")
    # The API logs its own canonical line per request.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"


def _add_trace(_logger: Any, _method: str, event: EventDict) -> EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"], event["span_id"] = f"{context.trace_id:032x}", f"{context.span_id:016x}"
    return event


def _flatten_extra(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """What libraries add to their records. The SDK's loggers carry what they know of a workflow as one field; ours
    are `workflow_id` and `run_id`."""
    for doubled in ("temporal_log", "color_message"):  # in the message already
        event.pop(doubled, None)
    for known in (event.pop("temporal_workflow", None), event.pop("temporal_activity", None)):
        if isinstance(known, Mapping):
            event["workflow_id"] = known.get("workflow_id")
            event["run_id"] = known.get("run_id") or known.get("workflow_run_id")
    return event


def _redact(_logger: Any, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        event[key] = REDACTED if key.lower() in PERSONAL else _redacted(value)
    return event


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: REDACTED if str(key).lower() in PERSONAL else _redacted(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_redacted(inner) for inner in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    # A model or an exception: its text can hold anything.
    return f"<{type(value).__name__}>"


def _without_messages(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Tracebacks with the place and the kind of an error. Messages of errors that are not ours quote what they
    choked on: a row, a payload."""
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    if isinstance(info, BaseException):
        info = type(info), info, info.__traceback__
    if info and info[1] is not None:
        event["exception"] = safe_traceback(info[1])
    text = event.get("event")
    if isinstance(text, str) and text.startswith("Traceback (most recent call last)"):
        # What Starlette hands to uvicorn when an application does not start: a stack that is text already.
        event["event"], event["exception"] = "the application failed", _safe_text(text)
    return event


def _safe_text(stack: str) -> str:
    lines = stack.splitlines()
    kinds = [line.split(":")[0] for line in lines if line[:1].isalpha() and not line.startswith("Traceback")]
    return "\n".join([*(line for line in lines if line.startswith("  File ")), *kinds[-1:]])


def safe_traceback(error: BaseException) -> str:
    """The stack of an error and of its causes, without messages, source lines or local variables."""
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        parts.append("\n".join([*_frames(current.__traceback__), _name(current)]))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\ncaused:\n".join(reversed(parts))


def _frames(stack: TracebackType | None) -> list[str]:
    frames = traceback.extract_tb(stack)[-_FRAMES:]
    return [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]


def _name(error: BaseException) -> str:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name}: {error.title}" if isinstance(error, TrellisError) else name
