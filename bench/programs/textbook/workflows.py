"""The order's workflow, and the shipment's as its child."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from bench.programs.textbook.activities import Activities, OrderInput

ORDERS, SHIPPING = "textbook", "textbook-shipping"
_STEP = timedelta(seconds=30)


@workflow.defn
class ShippingWorkflow:
    """Prepare, dispatch."""

    @workflow.run
    async def run(self, order_id: str) -> str:
        await workflow.execute_activity_method(Activities.prepare, order_id, start_to_close_timeout=_STEP)
        return await workflow.execute_activity_method(Activities.dispatch, order_id, start_to_close_timeout=_STEP)


@workflow.defn
class OrderWorkflow:
    """Receive, validate, wait for the approval, charge, ship."""

    def __init__(self) -> None:
        self._approved = False

    @workflow.run
    async def run(self, order: OrderInput) -> str:
        await workflow.execute_activity_method(Activities.receive, order, start_to_close_timeout=_STEP)
        await workflow.execute_activity_method(Activities.validate, order, start_to_close_timeout=_STEP)
        await workflow.wait_condition(lambda: self._approved, timeout=timedelta(minutes=10))
        await workflow.execute_activity_method(Activities.charge, order, start_to_close_timeout=_STEP)
        return await workflow.execute_child_workflow(
            ShippingWorkflow.run,
            order.order_id,
            id=f"shipping/{order.order_id}",
            task_queue=SHIPPING,
            parent_close_policy=workflow.ParentClosePolicy.ABANDON,
        )

    @workflow.signal
    def approve(self) -> None:
        self._approved = True
