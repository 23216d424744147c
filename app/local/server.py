"""The product's ASGI application, served inside the process that also runs the servers it needs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn

from app.http import serving
from app.local.process import POLL, LocalError

if TYPE_CHECKING:
    from app.settings import Settings

REQUESTS_GRACE = 3
"""Seconds open requests are given at a stop."""


class AppFailed(LocalError):
    """The application did not start"""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: there are more things to stop, and an order to keep."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _not_cancelled(record: logging.LogRecord) -> bool:
    """Whether a log record tells of something else than a request that was cut off by a stop."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class ApiServer:
    """An ASGI application on a socket that is bound already.

    Args:
        app: the application; its lifespan starts and drains the workers.
        bound: where it listens.
        settings: limits of its connections.
    """

    def __init__(self, app: Any, bound: socket.socket, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,  # the application configures logging, and writes its own line per request
            log_level="warning",
            access_log=False,
            http=serving.protocol(settings),
            timeout_keep_alive=settings.api_keep_alive_timeout,
            timeout_graceful_shutdown=REQUESTS_GRACE,
        )
        logging.getLogger("uvicorn.error").addFilter(_not_cancelled)
        self.url = local_url(*bound.getsockname()[:2])
        self._server = _Server(config)
        self._bound = bound
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, *more: str, timeout: float = 120.0) -> None:
        """Serve; returns when `/readyz`, and every other URL in `more`, answers 200.

        Raises:
            AppFailed: it ended first, or is not ready after `timeout` seconds.
        """
        self._task = asyncio.create_task(self._serve())
        waiting = [f"{self.url}/readyz", *more]
        answer = "nothing"
        async with httpx.AsyncClient(trust_env=False) as client:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    while waiting and not self._task.done():
                        answer = await _ask(client, waiting[0])
                        if answer == "200":
                            waiting.pop(0)
                        else:
                            await asyncio.sleep(POLL)
        if self._task.done():
            await self._task
        if waiting:
            raise AppFailed(f"{waiting[0]} answers {answer} after {timeout:.0f} s")

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


async def _ask(client: httpx.AsyncClient, url: str) -> str:
    """`200`, or what came instead."""
    try:
        answer = await client.get(url, timeout=5)
    except httpx.HTTPError:
        return "nothing"
    return "200" if answer.status_code == HTTPStatus.OK else f"{answer.status_code} {answer.text[:300]}"


def local_url(host: str, port: int) -> str:
    """Where a browser of this machine finds what is bound to `host`."""
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - recognised, not bound
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
