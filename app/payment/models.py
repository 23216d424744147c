"""The contract of the payment activities."""

from __future__ import annotations

from pydantic import BaseModel, Field

from app.domain.money import Money
from app.domain.steps import Step


class ChargeRequest(BaseModel):
    """Argument of the activity `charge`."""

    order_id: str
    payment_id: str
    money: Money
    approved: str = Field("", description="Digest of what was approved, kept with the event `charging`.")
    approval_note: str = Field("", description="What the clerk wrote, kept with the event `charging`.")


class RefundRequest(BaseModel):
    """Argument of the activity `refund`: give the money back and close the order, in one transaction."""

    order_id: str
    payment_id: str
    money: Money
    close_as: Step = Field(description="`cancelled` or `shipping_failed`.")
    reason: str
