"""What repairing an order is called, asked for and answered with."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, Field

#: Workflow and schedule id: one of each per namespace, so that two runs never overlap by accident.
RECONCILE_ID: Final = "trellis-reconcile"

#: Repairs that a report lists one by one; a payload of Temporal must not grow with the damage.
MAX_LISTED: Final = 200


class ReconcileRequest(BaseModel):
    """Argument of `ReconcileWorkflow` and of the activity `reconcile`."""

    apply: bool = Field(False, description="Settle; otherwise only say what would be done.")
    grace_seconds: float = Field(
        120.0, description="How long an order must have been at its step, and its workflow gone, before it is touched."
    )
    settle_seconds: float = Field(
        600.0,
        description="How long after its order was closed a payment in doubt is looked up for the last time. Longer "
        "than an attempt may last, and than the provider's look-up may lag behind its charges.",
    )
    accept_unknown: bool = Field(
        False, description="Settle although Temporal does not know more than a small share of the open orders."
    )


class Repair(BaseModel):
    """One order that was left behind."""

    order_id: str
    found: str = Field(description="Where the order was, and what became of its workflow.")
    action: str = Field(description="What was done, or would be.")
    done: bool
    detail: str = Field("", description="Why it is not done.")
    defect: bool = Field(False, description="Something unexpected stands in the way: for a person.")


class ReconcileReport(BaseModel):
    """Outcome of one pass."""

    looked_at: int = 0
    settled: int = 0
    left: int = Field(0, description="Orders that still need somebody: the next pass, or a person.")
    defects: int = Field(0, description="Those of them that something unexpected stands in the way of.")
    repairs: list[Repair] = []

    def add(self, repair: Repair) -> None:
        """Count a repair, and list it unless there are too many; defects first, as a person has to see them."""
        self.settled += repair.done
        self.left += not repair.done
        self.defects += repair.defect
        if repair.defect:
            self.repairs.insert(0, repair)
            del self.repairs[MAX_LISTED:]
        elif len(self.repairs) < MAX_LISTED:
            self.repairs.append(repair)
