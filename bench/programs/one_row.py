"""The least that a status read can cost: FastAPI, asyncpg, one row by its key.

`python -m bench.programs.one_row <port>`
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, HTTPException, Request

from bench.programs.books import open_pool


async def _keep_session(_: object) -> None:
    """As in Trellis: a pool that spares the statements of asyncpg's own reset."""


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with open_pool(reset=_keep_session) as app.state.pool:
        yield


app = FastAPI(lifespan=_lifespan)


@app.get("/orders/{order_id}/status")
async def status(order_id: str, request: Request) -> dict[str, str | None]:
    """The answer that Trellis gives."""
    row = await request.app.state.pool.fetchrow("SELECT state, last_error FROM orders WHERE id = $1", order_id)
    if row is None:
        raise HTTPException(404)
    return {"order_id": order_id, "step": row["state"], "last_error": row["last_error"]}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
