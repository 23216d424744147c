"""The pass over everything that was left behind, as an activity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from temporalio import activity

from app.reconcile.models import ReconcileReport, ReconcileRequest

if TYPE_CHECKING:
    from app.reconcile.reconciler import Reconciler

    Build = Callable[[ReconcileRequest, Callable[[], None]], Reconciler]


class ReconcileActivities:
    """One pass; safe to repeat from any point."""

    def __init__(self, build: Build) -> None:
        self._build = build

    @activity.defn
    async def reconcile(self, request: ReconcileRequest) -> ReconcileReport:
        """Settle what was left behind. Heartbeats for each order, so that a worker that died is noticed soon."""
        return await self._build(request, activity.heartbeat).run()
