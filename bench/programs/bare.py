"""The floor that Temporal sets: as many durable steps as an order has, and nothing in them.

No API, no database, no telemetry: five empty activities, a signal with a timer beside it, a child workflow on a task
queue of its own. It is asked over a line protocol that costs next to nothing; starting and signalling through the SDK
is in its figures, as it is in those of the others. `python -m bench.programs.bare <port>`
"""

from __future__ import annotations

import asyncio
import os
import sys
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

ORDERS, SHIPPING = "bare", "bare-shipping"
_STEP = timedelta(seconds=15)


@activity.defn
async def receive(order_id: str) -> None:
    """Nothing."""


@activity.defn
async def validate(order_id: str) -> None:
    """Nothing."""


@activity.defn
async def charge(order_id: str) -> None:
    """Nothing."""


@activity.defn
async def prepare(order_id: str) -> None:
    """Nothing."""


@activity.defn
async def dispatch(order_id: str) -> None:
    """Nothing."""


@workflow.defn
class BareShipping:
    """Two steps."""

    @workflow.run
    async def run(self, order_id: str) -> None:
        await workflow.execute_activity(prepare, order_id, start_to_close_timeout=_STEP)
        await workflow.execute_activity(dispatch, order_id, start_to_close_timeout=_STEP)


@workflow.defn
class BareOrder:
    """Three steps, an approval, and the child."""

    def __init__(self) -> None:
        self._approved = False

    @workflow.run
    async def run(self, order_id: str) -> str:
        await workflow.execute_activity(receive, order_id, start_to_close_timeout=_STEP)
        await workflow.execute_activity(validate, order_id, start_to_close_timeout=_STEP)
        await workflow.wait_condition(lambda: self._approved, timeout=timedelta(minutes=10))
        await workflow.execute_activity(charge, order_id, start_to_close_timeout=_STEP)
        await workflow.execute_child_workflow(
            BareShipping.run,
            order_id,
            id=f"shipping/{order_id}",
            task_queue=SHIPPING,
            parent_close_policy=workflow.ParentClosePolicy.ABANDON,
        )
        return "shipped"

    @workflow.signal
    def approve(self) -> None:
        self._approved = True


async def _serve(port: int) -> None:
    client = await Client.connect(os.environ["BENCH_TEMPORAL_ADDRESS"])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := (await reader.readline()).decode().split():
            verb, order_id = line
            if verb == "start":
                await client.start_workflow(BareOrder.run, order_id, id=f"order/{order_id}", task_queue=ORDERS)
            else:
                await client.get_workflow_handle(f"order/{order_id}").signal("approve")
            writer.write(b"done\n")
        writer.close()

    async with (
        Worker(client, task_queue=ORDERS, workflows=[BareOrder], activities=[receive, validate, charge]),
        Worker(client, task_queue=SHIPPING, workflows=[BareShipping], activities=[prepare, dispatch]),
        await asyncio.start_server(answer, "127.0.0.1", port) as server,
    ):
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
