"""The product's ASGI application, served inside the process that also runs the servers it needs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn

from app.local.processes import POLL, LocalError

REQUESTS_GRACE = 5
"""Seconds open requests are given at a stop; event streams never end by themselves."""


class AppFailed(LocalError):
    """The application did not start"""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: there are more things to stop, and an order to keep."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServer:
    """An ASGI application on a socket that is bound already.

    Args:
        app: the application; its lifespan starts and drains the workers.
        bound: where it listens.
    """

    def __init__(self, app: Any, bound: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,  # the application configures logging, and writes its own line per request
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=REQUESTS_GRACE,
        )
        self.url = _url(bound)
        self._server = _Server(config)
        self._bound = bound
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, *, timeout: float = 60.0) -> None:
        """Serve; returns when `/readyz` answers 200.

        Raises:
            AppFailed: it ended first, or is not ready after `timeout` seconds.
        """
        self._task = asyncio.create_task(self._serve())
        answer = "nothing"
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    while not self._task.done():
                        answer = await _ask(client)
                        if answer == "200":
                            return
                        await asyncio.sleep(POLL)
        if self._task.done():
            await self._task
        raise AppFailed(f"{self.url}/readyz still answers {answer} after {timeout:.0f} s; the log above says why")

    async def wait(self) -> None:
        """Wait for its end, which should not come before `stop`.

        Raises:
            AppFailed: it ended by itself.
        """
        if self._task is not None:
            await asyncio.shield(self._task)

    async def stop(self, within: float) -> bool:
        """Finish open requests and drain the workers; whether that was done `within` so many seconds.

        What is not done then, or when somebody is in a hurry, is cancelled.
        """
        if self._task is None:
            self._bound.close()
            return True
        self._server.should_exit = True
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({self._task, hurry}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        drained = self._task.done()
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=1)
        return drained

    def hurry(self) -> None:
        """Give up waiting in a `stop` that is under way or to come."""
        self._server.force_exit = True
        self._hurry.set()

    async def _serve(self) -> None:
        try:
            await self._server.serve(sockets=[self._bound])
        except SystemExit as error:
            # uvicorn's word for a lifespan that failed; let through, it would tear down the event loop.
            raise AppFailed("the log above says why") from error
        if not self._server.should_exit:
            raise AppFailed("it ended by itself; the log above says why")


async def _ask(client: httpx.AsyncClient) -> str:
    """Status of `/readyz`, in words where there is none."""
    try:
        return str((await client.get("/readyz", timeout=5)).status_code)
    except httpx.HTTPError:
        return "nothing"


def _url(bound: socket.socket) -> str:
    """Where a browser of this machine finds the socket."""
    host, port = bound.getsockname()[:2]
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - recognised, not bound
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
