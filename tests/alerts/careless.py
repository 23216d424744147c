"""A careless change of the order's workflow: an activity more, also for orders that have begun without it."""

from __future__ import annotations

from temporalio import workflow

from app.order.activities import OrderActivities
from app.order.models import OrderInput, OrderResult
from app.order.workflows import OrderWorkflow
from app.workflow import policies


@workflow.defn(name="OrderWorkflow")
class ValidatedTwice(OrderWorkflow):
    """The product's validates once."""

    @workflow.init
    def __init__(self, order: OrderInput) -> None:
        super().__init__(order)

    @workflow.run
    async def run(self, order: OrderInput) -> OrderResult:
        """See `OrderWorkflow.run`."""
        return await super().run(order)

    async def _validate(self) -> None:
        await workflow.execute_activity_method(OrderActivities.validate, self._order, **policies.DATABASE)
        await super()._validate()
