"""Spans for people to read, one line each, as `trellis run --trace` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import IO, Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode

#: Shown behind the name, if a span has them.
_SHOWN: Final = ("order.id", "temporal.activity.attempt", "http.response.status_code", "error.type")


class ReadableExporter(SpanExporter):
    """Writes a line per span: when it began, how long it took, its name, and what it belongs to.

    A span is written when it has ended, so children come before their parents; the ids say what belongs together.
    """

    def __init__(self, output: IO[str]) -> None:
        self._output = output

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write, and let the reader see it at once."""
        try:
            for span in sorted(spans, key=lambda each: each.start_time or 0):
                self._output.write(line(span) + "\n")
            self._output.flush()
        except (OSError, ValueError):  # a closed file or pipe
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def line(span: ReadableSpan) -> str:
    """One span as one line."""
    began, ended = span.start_time or 0, span.end_time or 0
    moment = datetime.fromtimestamp(began / 1e9, UTC).strftime("%H:%M:%S.%f")[:-3]
    context, parent = span.get_span_context(), span.parent
    known = span.attributes or {}
    facts = [f"{key}={value}" for key in _SHOWN if isinstance(value := known.get(key), str | int)]
    if span.status.status_code is StatusCode.ERROR:
        facts.append("ERROR")
    ids = [
        f"trace={context.trace_id:032x} span={context.span_id:016x}" if context else "",
        f"parent={parent.span_id:016x}" if parent else "root",
        *(f"link={link.context.trace_id:032x}" for link in span.links),
    ]
    return " ".join([moment, f"{(ended - began) / 1e6:9.1f} ms ", f"{span.name:<34}", *facts, " ", *ids])
