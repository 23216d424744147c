"""The same order on DBOS Transact, with its own tables beside the order's in one PostgreSQL.

Idiomatic and not slowed down: asynchronous workflows and steps, the approval by `send` and `recv`, the shipment as a
child workflow, notification by LISTEN and NOTIFY, the defaults for everything else; and a pool that spares the
statements with which asyncpg resets a connection, as Trellis does. `python -m bench.programs.dbos_shop <port>`
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from dbos import DBOS, DBOSConfig, SetWorkflowID
from fastapi import FastAPI
from pydantic import BaseModel

from bench.programs.books import SCHEMA, Books, open_partners, open_pool

_books: Books


@DBOS.step()
async def receive(order_id: str) -> None:
    """Write the order down."""
    await _books.receive(order_id)


@DBOS.step()
async def validate(order_id: str) -> None:
    """Open the review."""
    await _books.validate(order_id)


@DBOS.step()
async def charge(order_id: str, payment_id: str) -> str:
    """Take the money."""
    return await _books.charge(order_id, payment_id)


@DBOS.step()
async def prepare(order_id: str) -> None:
    """Make the parcel ready."""
    await _books.prepare(order_id)


@DBOS.step()
async def dispatch(order_id: str) -> str:
    """Hand the parcel over."""
    return await _books.dispatch(order_id)


@DBOS.workflow()
async def shipping(order_id: str) -> str:
    """Prepare, dispatch."""
    await prepare(order_id)
    return await dispatch(order_id)


@DBOS.workflow()
async def order(order_id: str, payment_id: str) -> str:
    """Receive, validate, wait for the approval, charge, ship."""
    await receive(order_id)
    await validate(order_id)
    if await DBOS.recv_async("decision", timeout_seconds=600) != "approve":
        return "expired"
    await charge(order_id, payment_id)
    with SetWorkflowID(f"shipping/{order_id}"):
        await shipping(order_id)
    return "shipped"


class Start(BaseModel):
    """Body of the start call."""

    payment_id: str


async def _keep_session(_: object) -> None:
    """Nothing of a session is changed, so nothing need be reset."""


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    global _books  # noqa: PLW0603 - steps are module-level functions in DBOS
    async with open_pool(reset=_keep_session) as pool, open_partners() as partners:
        await pool.execute(SCHEMA)
        _books = Books(pool, partners)
        DBOS.launch()
        try:
            yield
        finally:
            DBOS.destroy()


app = FastAPI(lifespan=_lifespan)


@app.post("/orders/{order_id}/start", status_code=202)
async def start(order_id: str, body: Start) -> dict[str, str]:
    """Start the order's workflow."""
    with SetWorkflowID(f"order/{order_id}"):
        await DBOS.start_workflow_async(order, order_id, body.payment_id)
    return {"order_id": order_id}


@app.post("/orders/{order_id}/signals/approve", status_code=202)
async def approve(order_id: str) -> dict[str, str]:
    """Send the approval."""
    await DBOS.send_async(f"order/{order_id}", "approve", topic="decision")
    return {"order_id": order_id}


if __name__ == "__main__":
    config: DBOSConfig = {
        "name": "shop",
        "system_database_url": os.environ["BENCH_DATABASE_URL"],
        "log_level": "WARNING",
        # Without one it hashes the source; every process would be of another version and leave the others' orders.
        "application_version": "1",
    }
    DBOS(config=config)
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
