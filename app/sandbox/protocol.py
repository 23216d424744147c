"""What both sandbox partners share: how they read, refuse, fail on purpose, and lose a reply."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import StrEnum, auto
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, TypeVar

import httpx
import structlog
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response

from app.sandbox.ledger import Answer

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from app.sandbox.ledger import Ledger, Partner

_log = structlog.get_logger(__name__)

Model = TypeVar("Model", bound=BaseModel)

#: Longest idempotency key taken, in characters.
MAX_KEY: Final = 1024


# --- refusing ----------------------------------------------------------------------------------------------


class RefusalError(Exception):
    """The partner says no: `{"error": {"code": ...}}`, with `Retry-After` where that helps."""

    def __init__(self, status: HTTPStatus, code: str, retry_after: float | None = None) -> None:
        self.answer = error(status, code)
        self.retry_after = retry_after
        super().__init__(code)


def error(status: HTTPStatus, code: str) -> Answer:
    """The partners' one form of an error."""
    return Answer(status, json.dumps({"error": {"code": code}}))


def respond(answer: Answer, **headers: str) -> Response:
    """The answer as a response, byte for byte; an underscore in a header's name stands for a hyphen."""
    return Response(
        answer.body,
        answer.status,
        {name.replace("_", "-"): value for name, value in headers.items()},
        media_type="application/json",
    )


def respond_json(body: object) -> Response:
    """200 with this body."""
    return respond(Answer(HTTPStatus.OK, json.dumps(body)))


async def refused(_request: Request, refusal: Exception) -> Response:
    """Exception handler of `RefusalError`."""
    assert isinstance(refusal, RefusalError)  # noqa: S101 - registered for nothing else
    if refusal.retry_after is None:
        return respond(refusal.answer)
    return respond(refusal.answer, Retry_After=str(max(1, math.ceil(refusal.retry_after))))


async def unstorable(_request: Request, _error: Exception) -> Response:
    """Exception handler of values that PostgreSQL cannot hold, such as NUL in a text."""
    return respond(error(HTTPStatus.BAD_REQUEST, "invalid_request"))


async def out_of_books(_request: Request, failure: Exception) -> Response:
    """Exception handler of `LEDGER_ERRORS`: a partner that cannot write does nothing and says "later"."""
    _log.warning("sandbox_ledger_unavailable", error_type=type(failure).__name__)
    return respond(error(HTTPStatus.SERVICE_UNAVAILABLE, "ledger_unavailable"))


# --- reading -----------------------------------------------------------------------------------------------


async def read(request: Request, model: type[Model]) -> Model:
    """The body as `model`.

    Raises:
        RefusalError: 400, it is not one.
    """
    try:
        return model.model_validate_json(await request.body())
    except ValidationError:
        raise RefusalError(HTTPStatus.BAD_REQUEST, "invalid_request") from None


def idempotency_key(request: Request) -> str | None:
    """The header `Idempotency-Key`; None if the client sent none.

    Raises:
        RefusalError: 400, it is empty or too long.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY:
        raise RefusalError(HTTPStatus.BAD_REQUEST, "idempotency_key_invalid")
    return key


# --- failing on purpose ------------------------------------------------------------------------------------


class Effect(StrEnum):
    """What a magic value does."""

    REFUSED = auto()  #: no, for ever
    FLAKY = auto()  #: 503 a few times
    SLOW = auto()  #: done at once, answered late
    LOST = auto()  #: done, but the reply to the request that did it is lost
    MUTE = auto()  #: done at the first request, but every reply is lost
    DOWN = auto()  #: 503 for a while since first seen
    DEAD = auto()  #: 503 for ever


@dataclass(frozen=True, slots=True)
class Faults:
    """How bad the magic values are."""

    flaky_failures: int = 2
    slow_seconds: float = 3.0
    down_seconds: float = 30.0


DEFAULT_FAULTS: Final = Faults()


async def enter(
    ledger: Ledger, partner: Partner, operation: str, subject: str, effect: Effect | None, faults: Faults
) -> None:
    """Let the request in, unless the partner is down: for everybody, or for this magic `subject`.

    Raises:
        RefusalError: 503.
    """
    await check_outage(ledger, partner)
    if effect is Effect.DEAD:
        raise _down("down")
    if effect not in (Effect.FLAKY, Effect.DOWN):
        return
    attempts = await ledger.count_attempt(operation, subject)
    if effect is Effect.FLAKY and attempts.count <= faults.flaky_failures:
        raise _down("flaky")
    if effect is Effect.DOWN and attempts.age_seconds < faults.down_seconds:
        raise _down("down")


async def check_outage(ledger: Ledger, partner: Partner) -> None:
    """Stop everybody while the outage switch is on.

    Raises:
        RefusalError: 503.
    """
    left = await ledger.outage_left(partner)
    if left > 0:
        raise _down("outage", left)


def _down(code: str, retry_after: float = 1.0) -> RefusalError:
    return RefusalError(HTTPStatus.SERVICE_UNAVAILABLE, code, retry_after)


class OutageRequest(BaseModel):
    """Body of the outage switch."""

    seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]


async def switch_outage(ledger: Ledger, partner: Partner, request: Request) -> Response:
    """Begin an outage, or end it with 0 seconds."""
    asked = await read(request, OutageRequest)
    await ledger.set_outage(partner, asked.seconds)
    return respond_json({"seconds": asked.seconds})


# --- losing a reply ----------------------------------------------------------------------------------------


class ReplyLost(httpx.RemoteProtocolError):
    """The connection broke off in the middle of the reply.

    The exception that httpx itself raises then: in process, through `httpx.ASGITransport`, it reaches the
    client as it is. Over the network, the server sees an application that failed after it had begun to answer;
    it can only close the connection, and the client's own httpx raises the same.
    """


class LostReply(Response):
    """A response of which only the beginning arrives."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> NoReturn:  # noqa: ARG002 - ASGI
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": headers})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})
        raise ReplyLost("the sandbox lost this reply on purpose")
