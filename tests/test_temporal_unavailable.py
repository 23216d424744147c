"""Which errors of Temporal mean "later": the API answers those with 503, and anything else with 500."""

from __future__ import annotations

import pytest
from temporalio.service import RPCError, RPCStatusCode

from app.temporal import is_unavailable


@pytest.mark.parametrize(
    ("status", "message", "later"),
    [
        (RPCStatusCode.UNAVAILABLE, "", True),
        (RPCStatusCode.DEADLINE_EXCEEDED, "Timeout expired", True),
        (RPCStatusCode.UNKNOWN, "transport error", True),
        (RPCStatusCode.FAILED_PRECONDITION, "Unable to perform workflow execution update", True),
        (RPCStatusCode.UNKNOWN, "something of the server's own", False),
        (RPCStatusCode.INVALID_ARGUMENT, "", False),
        (RPCStatusCode.PERMISSION_DENIED, "", False),
    ],
)
def test_later_or_no(status: RPCStatusCode, message: str, later: bool) -> None:
    assert is_unavailable(RPCError(message, status, b"")) is later
