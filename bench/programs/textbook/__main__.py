"""The order as people write it first: FastAPI, a workflow with a child, an activity for each step, default settings.

Nothing is tuned and nothing is spoilt: the SDK's own defaults for workers and clients, asyncpg's for the pool, one
transaction in each activity, the workflows in a file of their own. `python -m bench.programs.textbook <port>`
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel
from temporalio.client import Client
from temporalio.worker import Worker

from bench.programs.books import SCHEMA, Books, open_partners, open_pool
from bench.programs.textbook.activities import Activities, OrderInput
from bench.programs.textbook.workflows import ORDERS, SHIPPING, OrderWorkflow, ShippingWorkflow


class Start(BaseModel):
    """Body of the start call."""

    payment_id: str


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with open_pool() as pool, open_partners() as partners:
        await pool.execute(SCHEMA)
        steps = Activities(Books(pool, partners))
        app.state.client = client = await Client.connect(os.environ["BENCH_TEMPORAL_ADDRESS"])
        orders, shipping = [steps.receive, steps.validate, steps.charge], [steps.prepare, steps.dispatch]
        async with (
            Worker(client, task_queue=ORDERS, workflows=[OrderWorkflow], activities=orders),
            Worker(client, task_queue=SHIPPING, workflows=[ShippingWorkflow], activities=shipping),
        ):
            yield


app = FastAPI(lifespan=_lifespan)


@app.post("/orders/{order_id}/start", status_code=202)
async def start(order_id: str, body: Start, request: Request) -> dict[str, str]:
    """Start the order's workflow."""
    client: Client = request.app.state.client
    order = OrderInput(order_id, body.payment_id)
    await client.start_workflow(OrderWorkflow.run, order, id=f"order/{order_id}", task_queue=ORDERS)
    return {"order_id": order_id}


@app.post("/orders/{order_id}/signals/approve", status_code=202)
async def approve(order_id: str, request: Request) -> dict[str, str]:
    """Signal the approval."""
    client: Client = request.app.state.client
    await client.get_workflow_handle(f"order/{order_id}").signal(OrderWorkflow.approve)
    return {"order_id": order_id}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
