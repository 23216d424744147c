"""What Temporal knows of the orders: which workflows run, which have ended, and how."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError

from app.order.models import OrderInput, order_workflow_id
from app.shipping.models import shipping_workflow_id
from app.temporal.client import is_not_found

if TYPE_CHECKING:
    from temporalio.client import Client

_TIMEOUT: Final = timedelta(seconds=10)
_CLOSED: Final = "WorkflowType = 'OrderWorkflow' AND ExecutionStatus != 'Running'"
#: Ends of a workflow, as visibility spells them.
_ENDS: Final = {"terminated": "Terminated", "failed": "Failed", "timed_out": "TimedOut", "canceled": "Canceled"}
_PREFIX: Final = order_workflow_id("")


@dataclass(frozen=True)
class Fate:
    """Where a workflow is. `status` None: Temporal does not know it, never or no longer."""

    status: WorkflowExecutionStatus | None
    closed_at: datetime | None = None

    @property
    def running(self) -> bool:
        """Somebody is still at work. Also with a status that this code does not know yet: it has not ended."""
        return self.status is WorkflowExecutionStatus.RUNNING or (self.status is not None and self.closed_at is None)

    @property
    def told(self) -> str:
        """In a word, for a message."""
        return self.status.name.lower() if self.status else "unknown"


@dataclass(frozen=True)
class ClosedOrder:
    """An `OrderWorkflow` that has ended."""

    order_id: str
    run_id: str
    status: str
    closed_at: datetime | None


class Executions:
    """The executions of orders. Every method raises `RPCError` or `RuntimeError` when Temporal does not answer."""

    def __init__(self, temporal: Client) -> None:
        self._temporal = temporal

    async def fates(self, order_id: str) -> tuple[Fate, Fate]:
        """Of the order's workflow, and of its shipment's: of the latest run of each, which a reset or a start by hand
        makes anew."""
        return await self._fate(order_workflow_id(order_id)), await self._fate(shipping_workflow_id(order_id))

    async def running(self, order_id: str) -> bool:
        """Whether anything is still at work on the order."""
        return any(fate.running for fate in await self.fates(order_id))

    async def closed_orders(self, ends: Sequence[str] = ()) -> AsyncIterator[ClosedOrder]:
        """All that Temporal still remembers, newest first; with `ends`, only those that ended so."""
        query = _CLOSED
        if ends:
            query += f" AND ExecutionStatus IN ({', '.join(repr(_ENDS[end]) for end in ends)})"
        async for execution in self._temporal.list_workflows(query, rpc_timeout=_TIMEOUT):
            if execution.id.startswith(_PREFIX):
                yield ClosedOrder(
                    order_id=execution.id.removeprefix(_PREFIX),
                    run_id=execution.run_id,
                    status=execution.status.name.lower() if execution.status else "unknown",
                    closed_at=execution.close_time,
                )

    async def start_input(self, order: ClosedOrder) -> OrderInput | None:
        """What the order was started with; None if it cannot be read."""
        handle = self._temporal.get_workflow_handle(order_workflow_id(order.order_id), run_id=order.run_id)
        async for event in handle.fetch_history_events(page_size=1, rpc_timeout=_TIMEOUT):
            payloads = event.workflow_execution_started_event_attributes.input.payloads
            if not payloads:
                return None
            decoded = await self._temporal.data_converter.decode(payloads, [OrderInput])
            return decoded[0] if isinstance(decoded[0], OrderInput) else None
        return None

    async def _fate(self, workflow_id: str) -> Fate:
        try:
            description = await self._temporal.get_workflow_handle(workflow_id).describe(rpc_timeout=_TIMEOUT)
        except RPCError as error:
            if is_not_found(error):
                return Fate(None)
            raise
        return Fate(description.status, description.close_time)
