"""The rules: each takes the books of one order and yields what is wrong with them. Nothing here asks anybody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from typing import Final

from app.audit.models import Kind, Movement, Movements, OrderBooks, Parcel, ParcelState, PaymentRow, Violation
from app.domain.money import Money
from app.domain.steps import NEXT_STEPS, PaymentStatus, Step

#: Which payment goes with which step; None is no payment at all. INIT with a closed order is a matter of time: see
#: `_in_doubt`.
PAYMENT_AT: Final[dict[Step, frozenset[PaymentStatus | None]]] = {
    Step.RECEIVED: frozenset({None}),
    Step.AWAITING_REVIEW: frozenset({None}),
    Step.CHARGING: frozenset({PaymentStatus.INIT}),
    Step.CHARGED: frozenset({PaymentStatus.CHARGED}),
    Step.PREPARED: frozenset({PaymentStatus.CHARGED}),
    Step.SHIPPED: frozenset({PaymentStatus.CHARGED}),
    Step.REJECTED: frozenset({None}),
    Step.EXPIRED: frozenset({None}),
    # FAILED and INIT: the order was settled after its workflow was lost in the middle of a charge.
    Step.CANCELLED: frozenset({None, PaymentStatus.REFUNDED, PaymentStatus.FAILED, PaymentStatus.INIT}),
    Step.PAYMENT_FAILED: frozenset({None, PaymentStatus.FAILED}),
    Step.SHIPPING_FAILED: frozenset({PaymentStatus.REFUNDED}),
}

_STEP_NAMES: Final = frozenset(step.value for step in Step)
_SETTLED: Final = frozenset({PaymentStatus.CHARGED, PaymentStatus.REFUNDED})


def check_books(books: OrderBooks, settle_seconds: float) -> Iterator[Violation]:
    """What can be seen in the product's own tables. A charge in doubt may stay so for `settle_seconds`."""
    yield from _timeline(books)
    yield from _payment(books, settle_seconds)
    yield from _amounts(books)


def check_provider(books: OrderBooks, moved: Movements) -> Iterator[Violation]:
    """The product's books against the provider's."""
    yield from _counts(books, moved)
    yield from _known_to_both(books, moved)
    if moved.charges and not moved.refunds and not _charge_has_a_home(books):
        yield _violation(books, Kind.CHARGE_UNSETTLED, f"{_names(moved.charges)} while the order is {books.step}")
    if moved.refunds and books.step in {Step.SHIPPED, Step.PAYMENT_FAILED, Step.REJECTED, Step.EXPIRED}:
        yield _violation(books, Kind.REFUNDED_NOT_CLOSED, f"{_names(moved.refunds)} while the order is {books.step}")
    for movement in (*moved.charges, *moved.refunds):
        if movement.money != books.total:
            detail = f"the order is for {books.total}, the provider moved {movement.money}"
            yield _violation(books, Kind.AMOUNT_DIFFERS, detail)


def check_parcel(books: OrderBooks, parcel: Parcel) -> Iterator[Violation]:
    """The product's books against the carrier's."""
    taken = parcel.state is ParcelState.TAKEN
    if books.step is Step.SHIPPED and not (taken and parcel.tracking == books.tracking):
        yield _violation(
            books, Kind.PARCEL_MISSING, f"tracking {books.tracking}, the carrier: {parcel.state} {parcel.tracking}"
        )
    if taken and books.step.final and books.step is not Step.SHIPPED:
        yield _violation(books, Kind.PARCEL_UNSETTLED, f"{parcel.tracking} while the order is {books.step}")


# --- the timeline --------------------------------------------------------------------------------------------


def _timeline(books: OrderBooks) -> Iterator[Violation]:
    told = [event.type for event in books.events]
    for name, times in Counter(told).items():
        if times > 1:
            yield _violation(books, Kind.EVENT_DOUBLED, f"{name} {times} times")
    steps = [Step(name) for name in dict.fromkeys(told) if name in _STEP_NAMES]
    if not steps or steps[0] is not Step.RECEIVED:
        yield _violation(books, Kind.EVENT_MISSING, f"it begins with {steps[0] if steps else 'nothing'}")
    for earlier, later in pairwise(steps):
        if later not in NEXT_STEPS[earlier]:
            yield _violation(books, Kind.EVENT_MISSING, f"from {earlier} to {later}")
    if steps and steps[-1] is not books.step:
        yield _violation(books, Kind.EVENT_MISSING, f"it ends with {steps[-1]}, and the order is {books.step}")
    refunded = books.payment is not None and books.payment.status is PaymentStatus.REFUNDED
    if refunded and "refunded" not in told:
        yield _violation(books, Kind.EVENT_MISSING, "the payment is REFUNDED, and no event tells of it")


# --- the payment ---------------------------------------------------------------------------------------------


def _payment(books: OrderBooks, settle_seconds: float) -> Iterator[Violation]:
    status = books.payment.status if books.payment else None
    if status not in PAYMENT_AT[books.step]:
        detail = f"the order is {books.step}, its payment {status or 'not there'}"
        yield _violation(books, Kind.PAYMENT_STEP_MISMATCH, detail)
    elif books.step.final and status is PaymentStatus.INIT and books.step_seconds > settle_seconds:
        yield _violation(books, Kind.PAYMENT_IN_DOUBT, f"for {books.step_seconds:.0f} s")
    if books.payment and books.payment.payment_id != books.payment_id:
        detail = f"the order names {books.payment_id}, its payment is {books.payment.payment_id}"
        yield _violation(books, Kind.PAYMENT_STEP_MISMATCH, detail)


def _amounts(books: OrderBooks) -> Iterator[Violation]:
    payment = books.payment
    if payment is None:
        return
    for what, amount in (("asked", payment.asked), ("charged", _charged(payment))):
        if amount is not None and (amount, payment.currency) != (books.total.amount, books.total.currency):
            detail = f"the order is for {books.total}, {what} were {amount} {payment.currency}"
            yield _violation(books, Kind.AMOUNT_DIFFERS, detail)
    for event in books.events:
        if event.amount is None or event.type not in {Step.RECEIVED, Step.CHARGED, "refunded"}:
            continue
        if (Decimal(event.amount), event.currency) != (books.total.amount, books.total.currency):
            detail = f"the order is for {books.total}, the event {event.type} says {event.amount} {event.currency}"
            yield _violation(books, Kind.AMOUNT_DIFFERS, detail)


def _charged(payment: PaymentRow) -> Decimal | None:
    return payment.amount if payment.status in _SETTLED else None


# --- the provider --------------------------------------------------------------------------------------------


def _counts(books: OrderBooks, moved: Movements) -> Iterator[Violation]:
    if len(moved.charges) > 1:
        yield _violation(books, Kind.CHARGED_TWICE, f"{books.payment_id}: {_names(moved.charges)}")
    if len(moved.refunds) > 1:
        yield _violation(books, Kind.REFUNDED_TWICE, f"{books.payment_id}: {_names(moved.refunds)}")
    if moved.refunds and not moved.charges:
        yield _violation(books, Kind.REFUND_WITHOUT_CHARGE, f"{books.payment_id}: {_names(moved.refunds)}")


def _known_to_both(books: OrderBooks, moved: Movements) -> Iterator[Violation]:
    payment = books.payment
    if payment is None or payment.status not in _SETTLED:
        return
    pairs = [(payment.provider_reference, moved.charges, Kind.CHARGE_MISSING)]
    if payment.status is PaymentStatus.REFUNDED:
        pairs.append((payment.refund_reference, moved.refunds, Kind.REFUND_MISSING))
    for reference, movements, missing in pairs:
        if not movements:
            yield _violation(books, missing, f"{payment.payment_id} is {payment.status}")
        elif reference not in {movement.reference for movement in movements}:
            detail = f"{payment.payment_id} names {reference}, the provider {_names(movements)}"
            yield _violation(books, Kind.REFERENCE_DIFFERS, detail)


def _charge_has_a_home(books: OrderBooks) -> bool:
    """Whether a charge that was not given back is where it should be: in a shipped order, or one that goes on."""
    if books.step is Step.SHIPPED:
        return True
    # Closed by `reconcile` while an attempt at charging may have been in flight: it will look again, and refund.
    in_doubt = books.payment is not None and books.payment.status is PaymentStatus.INIT
    return books.step in {Step.CHARGING, Step.CHARGED, Step.PREPARED} or in_doubt


def _names(movements: list[Movement]) -> str:
    return ", ".join(f"{movement.reference} {_written(movement.money)}" for movement in movements)


def _written(money: Money) -> str:
    return f"({money})"


def _violation(books: OrderBooks, kind: Kind, detail: str) -> Violation:
    return Violation(kind=kind, order_id=books.order_id, detail=detail)
