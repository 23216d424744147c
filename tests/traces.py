"""Looks up the traces of shipped orders in a real Jaeger, and sees that each tree is complete.

    python -m tests.traces --api http://127.0.0.1:8000 --jaeger http://127.0.0.1:16686 --orders 20

Spans leave a process some seconds after they ended, so ask a little later than the orders ended. The exit code is 1 if
a trace is missing, has a span without its parent, has two roots, or lacks a step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, Final

import httpx

#: What every order that was shipped must have in its trace.
NEEDED: Final = (
    "POST /orders/{id}/start",
    "StartWorkflow:OrderWorkflow",
    "RunWorkflow:OrderWorkflow",
    *(
        f"{side}Activity:{name}"
        for name in ("receive", "validate", "charge", "prepare", "dispatch")
        for side in ("Start", "Run")
    ),
    "StartChildWorkflow:ShippingWorkflow",
    "RunWorkflow:ShippingWorkflow",
    "POST /v1/charges",
    "POST /v1/parcels",
    "INSERT orders",
    "INSERT payments",
    "UPDATE orders",
)


def faults(spans: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with a trace, as Jaeger's API has it."""
    if not spans:
        yield "not in Jaeger"
        return
    ids = {span["spanID"] for span in spans}
    parents = {
        span["spanID"]: [ref["spanID"] for ref in span.get("references", []) if ref["refType"] == "CHILD_OF"]
        for span in spans
    }
    roots = [span["operationName"] for span in spans if not parents[span["spanID"]]]
    if roots != ["POST /orders/{id}/start"]:
        yield f"roots: {roots}"
    lost = [span["operationName"] for span in spans if set(parents[span["spanID"]]) - ids]
    if lost:
        yield f"without their parent: {lost}"
    missing = set(NEEDED) - {span["operationName"] for span in spans}
    if missing:
        yield f"missing: {sorted(missing)}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.traces", description=__doc__.split("\n")[0])
    parser.add_argument("--api", required=True, metavar="URL")
    parser.add_argument("--jaeger", required=True, metavar="URL")
    parser.add_argument("--orders", type=int, default=20, help="how many of the newest shipped ones [20]")
    arguments = parser.parse_args()
    api = httpx.Client(base_url=arguments.api, timeout=15)
    jaeger = httpx.Client(base_url=arguments.jaeger, timeout=15)
    shipped = api.get("/orders", params={"step": "shipped", "limit": arguments.orders}).json()["orders"]
    wrong = 0
    for order in shipped:
        trace_id = api.get(f"/orders/{order['order_id']}").json()["trace_id"]
        answer = jaeger.get(f"/api/traces/{trace_id}") if trace_id else None
        spans = answer.json()["data"][0]["spans"] if answer is not None and answer.is_success else []
        found = list(faults(spans))
        wrong += bool(found)
        said = f"{'FAIL' if found else 'ok  '}  {order['order_id']}  {trace_id}  {len(spans)} spans"
        print(said, *found, sep="\n      ")  # noqa: T201 - a script that prints its findings
    print(f"\n{len(shipped)} orders, {wrong} wrong")  # noqa: T201
    return 1 if wrong or not shipped else 0


if __name__ == "__main__":
    sys.exit(main())
