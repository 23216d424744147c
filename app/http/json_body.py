"""Bodies as JSON that says one thing to everybody who reads it.

Python's reader makes floats of decimal numbers, takes the last of several values under one key, and guesses at
encodings. An order is money: what cannot be read in one way only is refused
(docs/decisions/0075-one-reading-of-json.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from decimal import Decimal
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute

from app.domain.types import shown
from app.errors import InvalidRequest


def loads(body: bytes) -> Any:
    """What is in a JSON text; decimal numbers as they are written.

    Raises:
        ValueError: it is no JSON.
        InvalidRequest: a key is there more than once.
    """
    # With a byte order mark, as some programs put one.
    return _reader.decode(body.decode("utf-8-sig"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidRequest(f"the key `{shown(twice)}` is there more than once", field="body")
    return found


_reader: Final = json.JSONDecoder(object_pairs_hook=_object, parse_float=Decimal, parse_constant=Decimal)


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body, for FastAPI, which makes a problem of what this raises."""
        return loads(await self.body())


class StrictRoute(APIRoute):
    """A route whose body is read by `loads`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI documents it; reads are left alone."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return read_strictly
