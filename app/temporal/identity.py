"""Which Temporal namespace this database belongs to.

The rows of open orders and the workflows that work on them are one system in two places. A database with another
environment's namespace looks as if every workflow were lost, and an approval would reach somebody else's order. So the
id that Temporal gave the namespace when it was made is written down when the first worker starts, and everything that
acts on both compares it. A name would not do: environments tend to have the same one.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import structlog
from opentelemetry.instrumentation.utils import suppress_instrumentation
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.service import RPCError

from app.db.pool import UNAVAILABLE
from app.errors import WrongNamespace
from app.telemetry.supervision import pauses

if TYPE_CHECKING:
    import asyncpg
    from temporalio.client import Client

_KEY: Final = "temporal_namespace_id"

_BOUND: Final = "SELECT value FROM system WHERE key = $1"
_CLAIM: Final = "INSERT INTO system (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING"
_BIND: Final = """
INSERT INTO system (key, value) VALUES ($1, $2)
ON CONFLICT (key) DO UPDATE SET value = excluded.value, set_at = clock_timestamp()
"""

#: Seconds for which a comparison holds.
_HOLDS: Final = 60.0

_TIMEOUT: Final = timedelta(seconds=5)

log = structlog.get_logger(__name__)


class Identity:
    """The database and the namespace of this process, compared."""

    def __init__(self, pool: asyncpg.Pool, temporal: Client) -> None:
        self._pool = pool
        self._temporal = temporal
        self._good_until = 0.0
        self._last: str | None = None
        self._heard = False
        self._asking = asyncio.Lock()

    async def require(self) -> None:
        """Return if the namespace is the database's. One that no worker has used yet belongs to any.

        Raises:
            WrongNamespace: it is another one's.
            RPCError: Temporal does not answer, or has no such namespace.
        """
        # One asks, and those that came meanwhile hear what it heard.
        async with self._asking:
            if time.monotonic() >= self._good_until:
                # It is about the system: no part of the trace of the order that happened to come along.
                with suppress_instrumentation():
                    await self._compare()

    async def _compare(self) -> None:
        bound = await self._remembered()
        if bound is None:
            return
        found = await self.found()
        if found != bound:
            name = self._temporal.namespace
            raise WrongNamespace(
                f"it belongs to the one with id {bound}, and the one named {name} here has id {found}. Check "
                "TRELLIS_DATABASE_URL, TRELLIS_TEMPORAL_ADDRESS and TRELLIS_TEMPORAL_NAMESPACE; after a move or a "
                "restore, `trellis namespace bind` says that they belong together"
            )
        self._good_until = time.monotonic() + _HOLDS

    async def _remembered(self) -> str | None:
        """What the database says; what it said last while it does not answer: a signal needs Temporal alone."""
        try:
            self._last, self._heard = await self.bound(), True
        except UNAVAILABLE:
            # That it belongs to none yet is an answer, too: a process that starts with its workers hears it once.
            if not self._heard:
                raise
        return self._last

    async def claim(self) -> None:
        """As `require`; and a database that belongs to no namespace yet belongs to this one from now on."""
        with suppress_instrumentation():
            if await self.bound() is None:
                await self._pool.execute(_CLAIM, _KEY, await self.found())
        await self.require()

    async def bind(self) -> str:
        """Let the database belong to this namespace, whatever it belonged to before; the namespace's id."""
        found = await self.found()
        await self._pool.execute(_BIND, _KEY, found)
        return found

    async def bound(self) -> str | None:
        """The id of the namespace that the database belongs to; None before the first worker has started."""
        value: str | None = await self._pool.fetchval(_BOUND, _KEY)
        return value

    async def found(self) -> str:
        """The id of the namespace that this process uses."""
        request = DescribeNamespaceRequest(namespace=self._temporal.namespace)
        described = await self._temporal.workflow_service.describe_namespace(request, retry=False, timeout=_TIMEOUT)
        return described.namespace_info.id or described.namespace_info.name


async def wait_until_ours(identity: Identity) -> None:
    """Claim the namespace, or wait until it is the database's; says in the log why it is not."""
    for pause in pauses():
        try:
            await identity.claim()
        except WrongNamespace as error:
            log.error("no work is taken from another system's Temporal", error=str(error), retry_in_seconds=pause)  # noqa: TRY400 - it is no crash
        except (RPCError, RuntimeError, *UNAVAILABLE) as error:
            log.warning("waiting for Temporal or PostgreSQL", error=type(error).__name__, retry_in_seconds=pause)
        else:
            return
        await asyncio.sleep(pause)
