"""The one tree of domain errors, translated at two edges.

A class's docstring is its message; the constructor takes the facts that complete it. Whether the work may be
tried again is a property of the class (`retryable`), and so is the HTTP status (`status`): the HTTP edge
(`app.api`) turns an error into an RFC 9457 problem, the Temporal edge (`app.temporal.interceptors`) into an
`ApplicationError` whose `type` is the class name. Temporal matches those names, so a rename is a breaking change.

Messages reach `orders.last_error`, events, logs and the Temporal UI: they name identifiers and rules, never an
address, a name or a card.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar


class TrellisError(Exception):
    """Something went wrong"""

    retryable: ClassVar[bool] = False
    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    #: Seconds after which the same call may be worth repeating; None: `problems.RETRY_AFTER` for 503, else not said.
    retry_after: int | None = None

    def __init__(self, detail: str = "") -> None:
        self.title = (type(self).__doc__ or "").splitlines()[0].rstrip(".")
        self.detail = detail
        super().__init__(f"{self.title}: {detail}" if detail else self.title)


# --- what a caller did -------------------------------------------------------------------------------------


class OrderNotFound(TrellisError):
    """No order has this id"""

    status = HTTPStatus.NOT_FOUND


class OrderConflict(TrellisError):
    """The order exists already with another request"""

    status = HTTPStatus.CONFLICT


class PaymentConflict(TrellisError):
    """The payment id belongs to another order or amount"""

    status = HTTPStatus.CONFLICT


class TooLate(TrellisError):
    """The order can no longer take this"""

    status = HTTPStatus.CONFLICT


class ReviewOutdated(TrellisError):
    """What was reviewed has changed"""

    status = HTTPStatus.CONFLICT


class AlreadyDecided(TrellisError):
    """The order was decided in this way before"""

    # What a workflow answers to a repeat that Temporal does not know as one; the API makes the first answer of it.
    status = HTTPStatus.CONFLICT


class TooManyChanges(TrellisError):
    """The order has had too many changes of this kind"""

    status = HTTPStatus.TOO_MANY_REQUESTS
    retry_after = 3600

    def __init__(self, detail: str = "", retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.retry_after = retry_after or self.retry_after


class InvalidRequest(TrellisError):
    """The request is not valid"""

    status = HTTPStatus.UNPROCESSABLE_ENTITY

    def __init__(self, detail: str = "", *, field: str = "") -> None:
        """`field`: where the fault is, as in `body.items`; then `detail` is the rule alone."""
        super().__init__(detail)
        self.field = field


# --- what the business decided -----------------------------------------------------------------------------


class OrderRejected(TrellisError):
    """The order failed validation"""


class PaymentDeclined(TrellisError):
    """The payment was declined"""


class ShipmentRefused(TrellisError):
    """The carrier will never take this parcel"""


# --- what may be better in a moment ------------------------------------------------------------------------


class PaymentUnavailable(TrellisError):
    """The payment provider did not answer"""

    retryable = True
    status = HTTPStatus.SERVICE_UNAVAILABLE


class PaymentMismatch(TrellisError):
    """The payment provider answered with another amount than it was asked for"""

    # Money has moved, so this is neither paid nor failed: the order waits as `charging`, where alerts see it.
    retryable = True


class RefundRefused(TrellisError):
    """The payment provider refuses to give the money back"""

    # The customer's money is still here: it is asked for again until a person has mended why, visibly.
    retryable = True


class CarrierUnavailable(TrellisError):
    """The carrier did not answer"""

    retryable = True
    status = HTTPStatus.SERVICE_UNAVAILABLE


class ServiceUnavailable(TrellisError):
    """A service this one depends on did not answer"""

    retryable = True
    status = HTTPStatus.SERVICE_UNAVAILABLE


class DatabaseUnavailable(ServiceUnavailable):
    """PostgreSQL did not answer"""

    # As it is in whatever stands between: it is away, busy, locked, or does not take us in for now. The detail is the
    # kind of error alone, as the driver's words may quote a row or an address.


class TimedOut(ServiceUnavailable):
    """The attempt ran out of time"""


class TooManyStreams(TrellisError):
    """Too many timelines are watched here"""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class WrongNamespace(TrellisError):
    """This database belongs to another Temporal namespace"""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class OrderLost(TrellisError):
    """The order's workflow was lost; a repair is under way"""

    # Terminated by force, say. `trellis reconcile` settles it, which takes a few minutes.
    retryable = True
    status = HTTPStatus.SERVICE_UNAVAILABLE
    retry_after = 60


# --- what was set up wrongly --------------------------------------------------------------------------------


class SettingsError(TrellisError):
    """A setting is wrong"""


# --- what must not happen ----------------------------------------------------------------------------------


class IllegalTransition(TrellisError):
    """The order cannot go from its state to this one"""

    status = HTTPStatus.CONFLICT
