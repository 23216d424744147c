"""The moment a process is told to stop, for what must end by itself before the server can.

uvicorn waits for open connections before it ends the application's lifespan, and an event stream stays open as long
as its order does. ASGI has no message for "the server is about to stop"; the signal is where it shows.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Final

#: What a supervisor and Ctrl-C send.
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def at_signal(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` on this event loop when a signal to stop arrives while the block runs, besides whoever handles it.

    A signal that nobody handles stays as it is, and outside the main thread there is none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    tell = partial(asyncio.get_running_loop().call_soon_threadsafe, act)
    installed = {
        number: _chain(number, handler, tell) for number in SIGNALS if callable(handler := signal.getsignal(number))
    }
    try:
        yield
    finally:
        for number, (ours, before) in installed.items():
            if signal.getsignal(number) is ours:
                signal.signal(number, before)


_Handler = Callable[[int, FrameType | None], Any]


def _chain(number: signal.Signals, before: _Handler, tell: Callable[[], object]) -> tuple[_Handler, _Handler]:
    def ours(received: int, frame: FrameType | None) -> None:
        tell()
        before(received, frame)

    signal.signal(number, ours)
    return ours, before
