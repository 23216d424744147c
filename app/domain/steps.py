"""The steps of an order and the moves between them: the one vocabulary of API, workflows and tables."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Step(StrEnum):
    """Where an order is: `step` in the API, `orders.state` in PostgreSQL, the type of the event that led here."""

    RECEIVED = "received"
    AWAITING_REVIEW = "awaiting_review"
    CHARGING = "charging"
    CHARGED = "charged"
    PREPARED = "prepared"
    SHIPPED = "shipped"
    REJECTED = "rejected"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    PAYMENT_FAILED = "payment_failed"
    SHIPPING_FAILED = "shipping_failed"

    @property
    def final(self) -> bool:
        """Nothing follows."""
        return not NEXT_STEPS[self]


#: Every move an order may make. PostgreSQL holds the same table in a trigger; a test compares the two.
NEXT_STEPS: Final[dict[Step, frozenset[Step]]] = {
    Step.RECEIVED: frozenset({Step.AWAITING_REVIEW, Step.REJECTED, Step.CANCELLED}),
    Step.AWAITING_REVIEW: frozenset({Step.CHARGING, Step.REJECTED, Step.EXPIRED, Step.CANCELLED}),
    Step.CHARGING: frozenset({Step.CHARGED, Step.PAYMENT_FAILED, Step.CANCELLED}),
    Step.CHARGED: frozenset({Step.PREPARED, Step.CANCELLED, Step.SHIPPING_FAILED}),
    Step.PREPARED: frozenset({Step.SHIPPED, Step.CANCELLED, Step.SHIPPING_FAILED}),
    Step.SHIPPED: frozenset(),
    Step.REJECTED: frozenset(),
    Step.EXPIRED: frozenset(),
    Step.CANCELLED: frozenset(),
    Step.PAYMENT_FAILED: frozenset(),
    Step.SHIPPING_FAILED: frozenset(),
}

FINAL_STEPS: Final = frozenset(step for step, following in NEXT_STEPS.items() if not following)


def steps_before(step: Step) -> list[Step]:
    """The steps an order may come from."""
    return [earlier for earlier, following in NEXT_STEPS.items() if step in following]


class PaymentStatus(StrEnum):
    """`payments.status`. INIT is in doubt: a charge has begun and its outcome is not recorded yet."""

    INIT = "INIT"
    CHARGED = "CHARGED"
    FAILED = "FAILED"
    REFUNDED = "REFUNDED"
