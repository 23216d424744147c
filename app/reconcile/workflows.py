"""`ReconcileWorkflow`: what the schedule starts."""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from app.reconcile.activities import ReconcileActivities
    from app.reconcile.models import ReconcileReport, ReconcileRequest
    from app.workflow import policies


@workflow.defn
class ReconcileWorkflow:
    """One pass, repeated until it came to its end."""

    @workflow.run
    async def run(self, request: ReconcileRequest) -> ReconcileReport:
        return await workflow.execute_activity_method(ReconcileActivities.reconcile, request, **policies.RECONCILE)
