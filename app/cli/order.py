"""`trellis order`: start orders, decide on them, look at them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from app.cli import output
from app.cli.client import DEFAULT_URL, EXIT_CODES, Api, AsJson, ExitCode, Url, connect, order_path
from app.domain.steps import Step

if TYPE_CHECKING:
    # The models take a while to load, and `--help` and `--json` do without.
    from app.order.models import OrderSummary, OrderView, ReviewTask

app = typer.Typer(no_args_is_help=True, help="Start orders, decide on them, look at them.", epilog=EXIT_CODES)
command: Final = partial(app.command, epilog=EXIT_CODES)

#: Most rows the API puts on one page.
PAGE: Final = 200
#: Seconds a tab may take.
COMPLETION_TIMEOUT: Final = 2.0
#: Seconds between two looks at the queue.
REFRESH: Final = 2.0


def _one_segment(order_id: str) -> str:
    # Everything else about ids is the API's to say; but this would be the path of something else.
    if not order_id or "/" in order_id:
        raise typer.BadParameter("an order id is not empty and has no slash")
    return order_id


def _known_ids(context: typer.Context, incomplete: str) -> list[str]:
    """For tab completion: the newest orders whose ids begin so. None where there is no API."""
    try:
        with connect(context.params.get("url") or DEFAULT_URL, timeout=COMPLETION_TIMEOUT, quiet=True) as api:
            newest = api.get("/orders", limit=PAGE)["orders"]
    except typer.Exit:
        return []
    return [order["order_id"] for order in newest if order["order_id"].startswith(incomplete)]


Id = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The order's id.", callback=_one_segment, autocompletion=_known_ids, show_default=False
    ),
]
Signal = Annotated[
    bool,
    typer.Option("--signal", help="Send it and do not wait for the answer; works while the workers are down."),
]
Note = Annotated[str, typer.Option(help="Why; it stays with the order.")]
Digest = Annotated[
    str | None,
    typer.Option(help="What `reviews` or `show` printed: refused if the order has changed since.", show_default=False),
]
Limit = Annotated[int, typer.Option(min=1, help="Most rows.")]
All = Annotated[bool, typer.Option("--all", help="Every row, however many.")]

AddressText = Annotated[str | None, typer.Option("--address", metavar="LINE1,CITY,STATE,ZIP", help="In one piece.")]
Line1 = Annotated[str | None, typer.Option("--line1", help="Street and number.")]
City = Annotated[str | None, typer.Option("--city")]
State = Annotated[str | None, typer.Option("--state")]
Zip = Annotated[str | None, typer.Option("--zip")]


# --- what changes an order


@command()
def start(
    order_id: Id,
    payment_id: Annotated[str | None, typer.Option(help="The payment's id.", show_default='"pay-" and ID')] = None,
    item: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SKU:QTY:PRICE",
            help="What is ordered; may be repeated.",
            show_default="a demo item, where there is a price for it",
        ),
    ] = None,
    currency: Annotated[str | None, typer.Option(help="ISO 4217 code.", show_default="USD")] = None,
    address: AddressText = None,
    line1: Line1 = None,
    city: City = None,
    state: State = None,
    zip_code: Zip = None,
    review_timeout: Annotated[
        int | None, typer.Option(metavar="SECONDS", help="Review window.", show_default="the API's")
    ] = None,
    customer_id: Annotated[str | None, typer.Option(help="Whose order it is.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Start an order. The same command again is the same order."""
    request = {
        "payment_id": f"pay-{order_id}" if payment_id is None else payment_id,
        "items": [_item(text) for text in item] if item else None,
        "currency": currency,
        "address": _address(address, line1, city, state, zip_code),
        "review_timeout_seconds": review_timeout,
        "customer_id": customer_id,
    }
    given = {name: value for name, value in request.items() if value is not None}
    with connect(url) as api:
        accepted = api.post(order_path(order_id, "/start"), given)
    if as_json:
        output.as_json(accepted)
    else:
        output.line(f"{accepted['order_id']} accepted: workflow {accepted['workflow_id']}, run {accepted['run_id']}")


@command()
def approve(
    order_id: Id,
    note: Note = "",
    digest: Digest = None,
    signal: Signal = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Approve an order that awaits its review."""
    if signal and note:
        raise typer.BadParameter("a signal carries no note", param_hint="--note")
    if signal and digest:
        raise typer.BadParameter("a signal carries no digest", param_hint="--digest")
    review = _review("approve", note, digest)
    with connect(url) as api:
        if signal:
            _signalled(api.post(order_path(order_id, "/signals/approve")), as_json)
        else:
            _decided(api.post(order_path(order_id, "/review"), review), "approval", as_json)


@command()
def reject(
    order_id: Id, note: Note = "", digest: Digest = None, url: Url = DEFAULT_URL, as_json: AsJson = False
) -> None:
    """Reject an order that awaits its review."""
    review = _review("reject", note, digest)
    with connect(url) as api:
        _decided(api.post(order_path(order_id, "/review"), review), "rejection", as_json)


@command()
def cancel(order_id: Id, signal: Signal = False, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Cancel an order, and refund it if it was charged. Too late once the carrier has the parcel."""
    with connect(url) as api:
        if signal:
            _signalled(api.post(order_path(order_id, "/signals/cancel")), as_json)
        else:
            _decided(api.post(order_path(order_id, "/cancel")), "cancellation", as_json)


@command("address")
def change_address(
    order_id: Id,
    address: AddressText = None,
    line1: Line1 = None,
    city: City = None,
    state: State = None,
    zip_code: Zip = None,
    signal: Signal = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Change where the parcel goes, until it is handed over."""
    body = _address(address, line1, city, state, zip_code)
    if body is None:
        raise typer.BadParameter(_WHOLE_ADDRESS)
    with connect(url) as api:
        if signal:
            _signalled(api.post(order_path(order_id, "/signals/address"), body), as_json)
        else:
            _decided(api.put(order_path(order_id, "/address"), body), "address", as_json)


# --- what looks at orders


@command()
def status(order_id: Id, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Where an order is, and what just went wrong."""
    with connect(url) as api:
        found = api.get(order_path(order_id, "/status"))
    if as_json:
        output.as_json(found)
    else:
        output.table(
            ("ORDER", "STEP", "LAST ERROR"), [(found["order_id"], Step(found["step"]), found["last_error"] or "")]
        )


@command()
def show(order_id: Id, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """All that is written down of an order."""
    with connect(url) as api:
        found = api.get(order_path(order_id))
    if as_json:
        output.as_json(found)
        return
    from app.order.models import OrderView

    order = OrderView.model_validate(found)
    output.facts(_facts(order))
    if order.items:
        output.line("")
        output.table(
            ("SKU", "QUANTITY", "UNIT PRICE"),
            [(item.sku, str(item.quantity), f"{item.unit_price} {order.currency}") for item in order.items],
        )


@command("list")
def list_orders(
    step: Annotated[Step | None, typer.Option(help="Only orders at this step.")] = None,
    customer: Annotated[str | None, typer.Option(metavar="ID", help="Only orders of this customer.")] = None,
    limit: Limit = 50,
    every: All = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Orders, newest first."""
    with connect(url) as api:
        found = _pages(api, "/orders", "orders", None if every else limit, step=step, customer_id=customer)
    if as_json:
        output.as_json(found)
        return
    from app.order.models import OrderPage

    page = OrderPage.model_validate(found)
    _rows(_ORDER_COLUMNS, [_order_row(order) for order in page.orders], page.next)


@command()
def reviews(
    limit: Limit = 50,
    every: All = False,
    again: Annotated[bool, typer.Option("--watch", help="Show the queue again every two seconds.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Orders that await a decision, the most urgent first."""
    with connect(url) as api, suppress(KeyboardInterrupt):
        while True:
            found = _pages(api, "/reviews", "reviews", None if every else limit)
            if again and not as_json:
                output.clear()
            _show_reviews(found, as_json=as_json, lines=again)
            if not again:
                return
            time.sleep(REFRESH)


def _show_reviews(found: dict[str, Any], *, as_json: bool, lines: bool) -> None:
    if as_json:
        output.as_json(found, lines=lines)
        return
    from app.order.models import ReviewPage

    page = ReviewPage.model_validate(found)
    _rows(_REVIEW_COLUMNS, [_review_row(task) for task in page.reviews], page.next)


@command()
def events(order_id: Id, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """What happened to an order, oldest first."""
    from app.cli import timeline

    with connect(url) as api:
        found = api.get(order_path(order_id, "/events"))
    if as_json:
        output.as_json(found)
    else:
        for event in found["events"]:
            timeline.show(event)


@command()
def watch(order_id: Id, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """What happens to an order, until it has ended. With --json, one object a line.

    Exit code 0 means shipped, 1 ended otherwise.
    """
    from app.cli import timeline

    shipped = False
    show: Callable[[timeline.Event], None] = partial(output.as_json, lines=True) if as_json else timeline.show
    with connect(url) as api:
        for event in timeline.watch(api, order_id):
            show(event)
            shipped = shipped or event["type"] == Step.SHIPPED
    if not shipped:
        raise typer.Exit(ExitCode.ENDED_OTHERWISE)


# --- arguments


_WHOLE_ADDRESS: Final = "an address is --line1, --city, --state and --zip, or all four in --address"


def _item(text: str) -> dict[str, Any]:
    sku, _, rest = text.partition(":")
    quantity, _, price = rest.partition(":")
    if not (sku and quantity.isascii() and quantity.isdecimal() and price):
        raise typer.BadParameter(f"{text!r} is not SKU:QTY:PRICE, such as TEA-100:2:12.50", param_hint="--item")
    # The price stays text, so that no float comes near it.
    return {"sku": sku, "quantity": int(quantity), "unit_price": price}


def _review(decision: str, note: str, digest: str | None) -> dict[str, str]:
    return {"decision": decision, "note": note} | ({"digest": digest} if digest else {})


def _address(text: str | None, *parts: str | None) -> dict[str, str] | None:
    if text is not None:
        if any(part is not None for part in parts):
            raise typer.BadParameter(_WHOLE_ADDRESS, param_hint="--address")
        # From the right: a street may have commas of its own.
        parts = tuple(part.strip() for part in text.rsplit(",", 3))
    elif all(part is None for part in parts):
        return None
    given = [part for part in parts if part is not None]
    if len(given) != 4:
        raise typer.BadParameter(_WHOLE_ADDRESS)
    return dict(zip(("line1", "city", "state", "zip"), given, strict=True))


# --- answers


def _decided(decided: dict[str, Any], what: str, as_json: bool) -> None:
    if as_json:
        output.as_json(decided)
    else:
        output.line(f"{decided['order_id']}: the {what} counts; the order is {decided['step']}{_still(what, decided)}")


def _still(what: str, decided: dict[str, Any]) -> str:
    if what != "cancellation" or Step(decided["step"]).final:
        return ""
    return ", and is cancelled as soon as it is known whether it was charged"


def _signalled(accepted: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.as_json(accepted)
    else:
        output.line(f"{accepted['order_id']}: {accepted['signal']} sent; the timeline tells whether it counts")


def _pages(api: Api, path: str, rows: str, most: int | None, **query: str | None) -> dict[str, Any]:
    """Rows of as many pages as it takes, as if they were one page."""
    found: list[Any] = []
    after: str | None = None
    while True:
        page = api.get(path, limit=PAGE if most is None else min(PAGE, most - len(found)), after=after, **query)
        found += page[rows]
        after = page["next"]
        if after is None or len(found) == most:
            return {rows: found, "next": after}


def _rows(columns: output.Row, rows: Sequence[output.Row], following: str | None) -> None:
    if not rows:
        output.remark("none")
        return
    output.table(columns, rows)
    if following:
        output.remark("There are more: --limit N or --all.")


_ORDER_COLUMNS: Final = ("ORDER", "STEP", "SINCE", "TOTAL", "PAYMENT", "CUSTOMER", "CREATED", "LAST ERROR")


def _order_row(order: OrderSummary) -> output.Row:
    return (
        order.order_id,
        order.step,
        output.moment(order.step_since),
        f"{order.total} {order.currency}",
        order.payment_id or "",
        order.customer_id or "",
        output.moment(order.created_at),
        order.last_error or "",
    )


_REVIEW_COLUMNS: Final = (
    *(
        "ORDER",
        "SECONDS LEFT",
        "DEADLINE",
        "TOTAL",
        "ITEMS",
        "PAYMENT",
        "CUSTOMER",
        "ORDERS BEFORE",
        "CHANGED",
        "DIGEST",
    ),
)


def _review_row(task: ReviewTask) -> output.Row:
    return (
        task.order_id,
        f"{task.seconds_left:.0f}",
        output.moment(task.review_deadline),
        f"{task.total} {task.currency}",
        ", ".join(f"{item.quantity} {item.sku}" for item in task.items),
        task.payment_id or "",
        task.customer_id or "",
        "" if task.earlier_orders is None else str(task.earlier_orders),
        task.reopened_for or "",
        task.digest,
    )


def _facts(order: OrderView) -> list[tuple[str, str]]:
    address, payment = order.address, order.payment
    return [
        ("order", order.order_id),
        ("step", order.step),
        ("since", output.moment(order.step_since)),
        ("last error", order.last_error or ""),
        ("total", f"{order.total} {order.currency}"),
        ("payment", f"{payment.payment_id} {payment.status}" if payment else order.payment_id or ""),
        ("reference", (payment and payment.provider_reference) or ""),
        ("customer", order.customer_id or ""),
        ("address", f"{address.line1}, {address.city}, {address.state}, {address.zip}" if address else ""),
        ("review until", output.moment(order.review_deadline)),
        ("note", order.review_note or ""),
        ("reason", order.reason or ""),
        ("review again", f"{order.reopened_for} changed" if order.reopened_for else ""),
        ("digest", order.digest),
        ("tracking", order.tracking or ""),
        ("workflow", order.workflow_id),
        ("run", order.run_id or ""),
        ("created", output.moment(order.created_at)),
    ]
