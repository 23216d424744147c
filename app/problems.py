"""RFC 9457 problems: how every error looks to a caller, and how OpenAPI documents it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

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
    errors: list[Fault] | None = Field(None, description="With 422: every field at fault.")


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


_MEANINGS: Final[dict[int, str]] = {
    403: "A browser sent it for another site. Nothing was changed.",
    404: "No order has this id.",
    408: "The body did not arrive in time. Nothing was changed.",
    409: "It conflicts with what the order is, and `detail` says how. Nothing was changed.",
    413: "The body is over 64 KiB.",
    415: "The body has a Content-Encoding. Nothing was changed.",
    421: "The API does not answer to this `Host`; `TRELLIS_ALLOWED_HOSTS` lists its names.",
    422: "A field is not valid, and `errors` says which and why. Nothing was changed.",
    503: "PostgreSQL or Temporal did not answer, or too much is asked at once. Repeat the same call after "
    "`Retry-After` seconds.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses=` of a route: the problems it answers with, besides those that all can; a route that names 413
    has a body."""
    body = {403, 408, 415} if 413 in statuses else set()
    return {
        status: {
            "description": _MEANINGS[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted({*statuses, *body, 421, 422, 503})
    }
