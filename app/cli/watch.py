"""`trellis watch`: what happens to all orders."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Final

import typer

from app.cli import output
from app.cli.client import DEFAULT_URL, AsJson, Url, connect
from app.domain.steps import Step

#: Orders that are looked at, the newest: one page of the API.
NEWEST: Final = 200
#: Seconds between two looks.
REFRESH: Final = 1.0

#: What of an order is shown when it changes.
Seen = tuple[str, str | None]


def watch(
    step: Annotated[Step | None, typer.Option(help="Only orders that enter this step.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """The 200 newest orders: every change of step and every error, as it is seen once a second, until Ctrl-C.

    A step that lasts less than a second may be missed; `trellis order watch ID` shows every event of one order.
    """
    show = partial(output.as_json, lines=True) if as_json else _show
    seen: dict[str, Seen] = {}
    with connect(url) as api, suppress(KeyboardInterrupt):
        while True:
            newest = api.get("/orders", limit=NEWEST)["orders"]
            for order in changed(newest, seen):
                if step is None or order["step"] == step:
                    show(order)
            seen = {order["order_id"]: _telling(order) for order in newest}
            time.sleep(REFRESH)


def changed(newest: list[dict[str, Any]], seen: dict[str, Seen]) -> list[dict[str, Any]]:
    """Orders that are new or differ from what was seen of them, those first that changed first."""
    fresh = [order for order in newest if seen.get(order["order_id"]) != _telling(order)]
    return sorted(fresh, key=lambda order: str(order["step_since"]))


def _telling(order: dict[str, Any]) -> Seen:
    return order["step"], order["last_error"]


def _show(order: dict[str, Any]) -> None:
    from app.order.models import OrderSummary

    row = OrderSummary.model_validate(order)
    since, total = output.moment(row.step_since), f"{row.total} {row.currency}"
    output.line(f"{since}  {row.order_id:<24}  {row.step:<16}  {total}  {row.last_error or ''}".rstrip(), like=row.step)
