"""The HTTP interface of orders. The paths, bodies and answers of the first block are published: docs/api.md."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Final

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import Response
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BeforeValidator

from app.domain.steps import Step
from app.domain.types import whole_number
from app.errors import InvalidRequest, OrderNotFound
from app.http.json_body import StrictRoute
from app.http.problems import problems
from app.order.bodies import ReviewBody, StartOrderBody
from app.order.feed import EventFeed
from app.order.models import (
    Accepted,
    Decided,
    Event,
    Events,
    OrderId,
    OrderPage,
    OrderStatus,
    OrderView,
    ReviewPage,
    ShortId,
    SignalBody,
    StartAccepted,
)
from app.order.repository import OrderRepository
from app.order.service import OrderService
from app.shipping.models import AddressBody

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

#: A number of so many digits still fits PostgreSQL's bigint.
MAX_EVENT_DIGITS: Final = 18

router = APIRouter(route_class=StrictRoute)


@dataclass(frozen=True)
class OrderParts:
    """What the routes need; `app.api` puts one on the application's state as `orders`."""

    service: OrderService
    repository: OrderRepository
    feed: EventFeed


async def _parts(request: Request) -> OrderParts:  # FastAPI would call a plain function in a thread
    parts: OrderParts = request.app.state.orders
    return parts


Orders = Annotated[OrderParts, Depends(_parts)]
Id = Annotated[OrderId, Path(alias="id", description="1 to 64 of `A-Z a-z 0-9 . _ -`.", examples=["o-1"])]
After = Annotated[str | None, Query(description="`next` of the page before.")]
Customer = Annotated[ShortId | None, Query(description="Only orders of this customer.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        description="The same for repeats of the same call, another for another change. Without it a repeat is "
        "attached to the first call until an address has been written.",
    ),
]
Limit = Annotated[int, BeforeValidator(whole_number), Query(ge=1, le=200, description="Most rows of a page.")]


# --- published


@router.post(
    "/orders/{id}/start",
    status_code=202,
    tags=["orders"],
    summary="Start an order",
    response_description="The order is durable, and will be carried to an end.",
    responses=problems(409, 413),
)
async def start(order_id: Id, body: StartOrderBody, orders: Orders) -> StartAccepted:
    """Accept an order. With 202 it is durable: it will be carried to an end whatever crashes.

    The same call again answers the same; another request under the same id, or a payment id of another order, gets
    409 and charges nothing.
    """
    return await orders.service.start(order_id, body.request)


@router.post(
    "/orders/{id}/signals/approve",
    status_code=202,
    tags=["signals"],
    summary="Approve",
    response_description="Sent. Whether it counts, the timeline reports.",
    responses=problems(404, 409, 413, 429),
)
async def approve(order_id: Id, orders: Orders, _: SignalBody | None = None) -> Accepted:
    """Approve the order. It counts when it reaches the workflow before the review window has been closed; an event
    says so when it did not."""
    await orders.service.approve(order_id)
    return Accepted(order_id=order_id, signal="approve")


@router.post(
    "/orders/{id}/signals/cancel",
    status_code=202,
    tags=["signals"],
    summary="Cancel",
    response_description="Sent. Whether it counts, the timeline reports.",
    responses=problems(404, 409, 413, 429),
)
async def cancel(order_id: Id, orders: Orders, _: SignalBody | None = None) -> Accepted:
    """Cancel the order. What was charged is refunded, unless the carrier has the parcel; then an event says so."""
    await orders.service.cancel(order_id)
    return Accepted(order_id=order_id, signal="cancel")


@router.post(
    "/orders/{id}/signals/address",
    status_code=202,
    tags=["signals"],
    summary="Change the address",
    response_description="Sent. Whether it counts, the timeline reports.",
    responses=problems(404, 409, 413, 429),
)
async def signal_address(order_id: Id, body: AddressBody, orders: Orders) -> Accepted:
    """Change the address, until the parcel is handed over."""
    await orders.service.signal_address(order_id, body.address)
    return Accepted(order_id=order_id, signal="address")


@router.get(
    "/orders/{id}/status",
    tags=["orders"],
    summary="Where an order is",
    response_description="The step, and the latest failed attempt while it is retried.",
    responses=problems(404),
)
async def status(order_id: Id, orders: Orders) -> OrderStatus:
    """Step and last error, also while Temporal or the workers are down."""
    return await orders.service.status(order_id)


# --- calls that are answered


@router.post(
    "/orders/{id}/review",
    tags=["reviews"],
    summary="Decide a review",
    response_description="This decision counts; `step` is where it leads.",
    responses=problems(404, 409, 413),
)
async def review(order_id: Id, body: ReviewBody, orders: Orders) -> Decided:
    """Approve or reject. 200 means that this decision is the one that counts; the same again gets the same answer."""
    return await orders.service.review(order_id, body.review)


@router.post(
    "/orders/{id}/cancel",
    tags=["orders"],
    summary="Cancel, answered",
    response_description="Nothing will stay charged.",
    responses=problems(404, 409, 413, 429),
)
async def cancel_now(order_id: Id, orders: Orders, _: SignalBody | None = None) -> Decided:
    """Cancel. 200 means that nothing will stay charged; 409 that it is too late. The same again gets the same
    answer."""
    return await orders.service.cancel_now(order_id)


@router.put(
    "/orders/{id}/address",
    tags=["orders"],
    summary="Change the address, answered",
    response_description="The parcel will go there.",
    responses=problems(404, 409, 413, 429),
)
async def change_address(
    order_id: Id, body: AddressBody, orders: Orders, idempotency_key: IdempotencyKey = None
) -> Decided:
    """Change the address. 200 means that the parcel will go there."""
    return await orders.service.change_address(order_id, body.address, idempotency_key)


# --- reads


@router.get(
    "/orders", tags=["orders"], summary="List orders", response_description="A page of orders.", responses=problems()
)
async def newest(
    orders: Orders, step: Step | None = None, customer_id: Customer = None, after: After = None, limit: Limit = 50
) -> OrderPage:
    """Orders, newest first; those of one step, one customer, or both."""
    return await orders.repository.newest(step, after, limit, customer_id)


@router.get(
    "/orders/{id}",
    tags=["orders"],
    summary="All of an order",
    response_description="The order.",
    responses=problems(404),
)
async def view(order_id: Id, orders: Orders) -> OrderView:
    """Everything that is written down of an order."""
    found = await orders.repository.view(order_id)
    if found is None:
        raise OrderNotFound(order_id)
    return found


@router.get(
    "/orders/{id}/events",
    tags=["orders"],
    summary="The timeline",
    response_description="The events, oldest first; as a stream also those to come.",
    response_model=Events,
    responses={
        **problems(404),
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "With `text/event-stream`: the order has ended, and `Last-Event-ID` was its last event."},
    },
)
async def events(
    order_id: Id,
    orders: Orders,
    accept: Annotated[str, Header()] = "application/json",
    last_event_id: Annotated[
        str | None, Header(description="With `text/event-stream`: go on after this event.")
    ] = None,
) -> Response | Events:
    """What happened, oldest first. With `Accept: text/event-stream` also what happens, until the order has ended."""
    status = await orders.service.status(order_id)
    if not wants_stream(accept):
        return await orders.repository.events(order_id)
    after = _event_number(last_event_id)
    if not status.step.final:
        return _LiveTimeline(orders.feed, order_id, after)
    rest = await orders.repository.events(order_id, after)
    # A browser comes back when a stream ends, and goes on doing so until it is told that there is no more.
    return _stream(_told(rest)) if rest.events else Response(status_code=HTTPStatus.NO_CONTENT)


@router.get(
    "/reviews",
    tags=["reviews"],
    summary="The clerk's queue",
    response_description="A page of reviews, the most urgent first.",
    responses=problems(),
)
async def reviews(orders: Orders, after: After = None, limit: Limit = 50) -> ReviewPage:
    """Orders that wait for a decision, the most urgent first."""
    return await orders.repository.in_review(after, limit)


def wants_stream(accept: str) -> bool:
    """Whether a client prefers, or likes as well, a live timeline. It has to name it: `*/*` is JSON."""
    weights = {"text/event-stream": 0.0, "application/json": 0.0}
    for media_range in accept.lower().split(","):
        name, *parameters = (part.strip() for part in media_range.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        weights[name] = float(weight) if _WEIGHT.fullmatch(weight) else 0.0
    return 0 < weights["text/event-stream"] >= weights["application/json"]


#: RFC 9110, 12.4.2.
_WEIGHT: Final = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?", re.ASCII)


def _event_number(last_event_id: str | None) -> int:
    number = last_event_id or "0"
    if not (number.isascii() and number.isdecimal() and len(number) <= MAX_EVENT_DIGITS):
        raise InvalidRequest("Last-Event-ID: not the id of an event")
    return int(number)


#: A proxy that collects an answer before it passes it on, or compresses it, makes a stream of nothing.
_STREAM_HEADERS: Final = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


def _stream(events: AsyncIterator[Event | None]) -> Response:
    return EventSourceResponse(_server_sent(events), headers=_STREAM_HEADERS)


class _LiveTimeline(EventSourceResponse):
    """A stream that holds one of the feed's places for as long as it is sent."""

    def __init__(self, feed: EventFeed, order_id: str, after: int) -> None:
        super().__init__(_server_sent(feed.watch(order_id, after)), headers=_STREAM_HEADERS)
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.place(scope["client"][0] if scope.get("client") else ""):
            await super().__call__(scope, receive, send)


async def _told(events: Events) -> AsyncIterator[Event]:
    for event in events.events:
        yield event


async def _server_sent(stream: AsyncIterator[Event | None]) -> AsyncIterator[bytes]:
    async for event in stream:
        if event is None:
            yield format_sse_event(comment="still here")
        else:
            yield format_sse_event(id=str(event.id), event=event.type, data_str=event.model_dump_json())
