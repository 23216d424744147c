"""RFC 9457 problems: how every error looks to a caller, and how OpenAPI documents it."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Final

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from app.errors import TrellisError

MEDIA_TYPE: Final = "application/problem+json"

#: Seconds a caller is asked to wait after a 503: the servers behind are usually back within that.
RETRY_AFTER: Final = 2


class Fault(BaseModel):
    """One field that is not valid."""

    field: str = Field(examples=["body.payment_id"])
    rule: str = Field(examples=["Field required"])


class Problem(BaseModel):
    """Why a call was refused (RFC 9457)."""

    type: str = Field("about:blank", examples=["about:blank"])
    title: str = Field(examples=["The order can no longer take this"])
    status: int = Field(examples=[409])
    detail: str | None = Field(None, examples=["o-1 is shipped"])
    code: str = Field("", description="A name that programs can match.", examples=["TooLate"])
    errors: list[Fault] | None = Field(None, description="With 422: every field at fault, up to 100 of them.")


class ProblemResponse(JSONResponse):
    """A problem as an answer."""

    media_type = MEDIA_TYPE

    def __init__(self, problem: Problem, headers: dict[str, str] | None = None) -> None:
        retry = {"Retry-After": str(RETRY_AFTER)} if problem.status == HTTPStatus.SERVICE_UNAVAILABLE else {}
        super().__init__(
            problem.model_dump(exclude_none=True),
            status_code=problem.status,
            headers={**retry, **(headers or {})},
        )


#: Codes of problems that are no `TrellisError`: refused before any code of ours, or by a server behind it.
_OTHER_CODES: Final[dict[str, tuple[int, str]]] = {
    "CrossSite": (403, "Another site may not change orders"),
    "RequestTimeout": (408, "The body did not arrive in time"),
    "BodyTooLarge": (413, "The body is too large"),
    "BodyEncoded": (415, "The body is encoded"),
    "HostNotAllowed": (421, "This is not a name of this API"),
    "Overloaded": (503, "Too much is asked at once"),
    "NamespaceNotFound": (503, "Temporal has no such namespace"),
    "NotFound": (404, "There is no such path"),
    "MethodNotAllowed": (405, "The path does not take this method"),
    "DatabaseUnavailable": (503, "PostgreSQL did not answer"),
    "TemporalUnavailable": (503, "Temporal did not answer"),
    "Unexpected": (500, "Something went wrong here"),
}


def codes() -> dict[str, tuple[int, str]]:
    """Every `code` that a problem can have, with its status and what it means."""
    ours = {
        error.__name__: (int(error.status), (error.__doc__ or "").splitlines()[0].rstrip("."))
        for error in _kinds(TrellisError)
        # Those of commands reach no caller of the API, and count only where somebody has imported them.
        if error.__module__ == TrellisError.__module__ and error.status is not HTTPStatus.INTERNAL_SERVER_ERROR
    }
    return dict(sorted((ours | _OTHER_CODES).items(), key=lambda code: (code[1][0], code[0])))


def _kinds(error: type[TrellisError]) -> Iterator[type[TrellisError]]:
    for kind in error.__subclasses__():
        yield kind
        yield from _kinds(kind)


def code_schema() -> dict[str, Any]:
    """For OpenAPI: the codes as an enumeration. More may come, so a client treats an unknown one by its status."""
    known = codes()
    meanings = "\n".join(f"- `{code}` ({status}): {meaning}" for code, (status, meaning) in known.items())
    return {"enum": list(known), "description": f"A name that programs can match.\n\n{meanings}"}


_MEANINGS: Final[dict[int, str]] = {
    403: "A browser sent it for another site. Nothing was changed.",
    404: "No order has this id.",
    408: "The body did not arrive in time. Nothing was changed.",
    409: "It conflicts with what the order is, and `detail` says how. Nothing was changed.",
    413: "The body is over 64 KiB.",
    415: "The body has a Content-Encoding. Nothing was changed.",
    421: "The API does not answer to this `Host`; `TRELLIS_ALLOWED_HOSTS` lists its names.",
    422: "A field is not valid, and `errors` says which and why. Nothing was changed.",
    429: "The order has had too many changes of this kind. Nothing was changed. `Retry-After` says in how many seconds "
    "there is room again.",
    503: "PostgreSQL, Temporal or a worker did not answer, too much is asked at once, or the order's workflow was lost "
    "and a repair is under way. Repeat the same call after `Retry-After` seconds.",
}


#: Answers after which the same call is worth repeating.
_TEMPORARY: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})

_RETRY_HEADER: Final = {
    "Retry-After": {"description": "Seconds to wait before the same call is repeated.", "schema": {"type": "integer"}}
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses=` of a route: the problems it answers with, besides those that all can; a route that names 413
    has a body."""
    body = {403, 408, 415} if 413 in statuses else set()
    return {
        status: {
            "description": _MEANINGS[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            **({"headers": _RETRY_HEADER} if status in _TEMPORARY else {}),
        }
        for status in sorted({*statuses, *body, 421, 422, 503})
    }
