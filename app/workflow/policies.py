"""Every retry policy and time-out of the workflows, each with its reason.

No activity has a total time limit unless it says so: an accepted order waits for a dependency that is down,
visibly (`last_error`, events, metrics), rather than fail because of it. Errors that no repeat can mend are
non-retryable by their class (`app.errors`), so no policy lists names.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, NamedTuple, TypedDict

from temporalio.common import RetryPolicy


class ActivityOptions(TypedDict, total=False):
    """What is handed to `workflow.execute_activity` besides the activity and its argument."""

    start_to_close_timeout: timedelta
    schedule_to_close_timeout: timedelta
    heartbeat_timeout: timedelta
    retry_policy: RetryPolicy


class LocalOptions(TypedDict):
    """The same for `workflow.execute_local_activity`."""

    start_to_close_timeout: timedelta
    retry_policy: RetryPolicy


class Limits(NamedTuple):
    """Seconds after which an attempt is ended by the worker that makes it; None: never."""

    work: float | None
    whole: float | None


def limits(start_to_close: timedelta | None) -> Limits:
    """An attempt ends here before Temporal gives it up: with its error in the timeline, and never beside the next one.

    `work` is for waiting for connections, for statements and for a partner, whatever their own limits add up to;
    what is left until `whole` is for recording how it ended.
    """
    if start_to_close is None:
        return Limits(None, None)
    seconds = start_to_close.total_seconds()
    return Limits(seconds - min(3.0, seconds / 5), seconds - min(1.0, seconds / 10))


#: One or two SQL statements. The longest wait for a connection and the longest statement end within `limits`, so that
#: 15 s without an answer mean that the worker is gone. A database that restarts is back in seconds: repeat soon, but
#: no more than twice a minute when it stays away.
DATABASE: Final = ActivityOptions(
    start_to_close_timeout=timedelta(seconds=15),
    retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(seconds=30)),
)

#: The first attempt at it, where the workflow runs. Once, because a repeat belongs on the task queue, where it can be
#: seen; and shorter than the workflow task's 10 s, as signals and updates of the order wait for it.
LOCAL: Final = LocalOptions(start_to_close_timeout=timedelta(seconds=5), retry_policy=RetryPolicy(maximum_attempts=1))

#: A provider's call (10 s at most, `TRELLIS_PARTNER_TIMEOUT`) between two transactions. For ever: the outcome of a
#: charge that has begun must be known. Once a minute at most, because providers limit rates.
PAYMENT: Final = ActivityOptions(
    start_to_close_timeout=timedelta(seconds=40),
    retry_policy=RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=1)),
)


#: A carrier's call. A parcel that nobody takes is refunded, not kept for ever; but that is not for the retry policy to
#: say, which would count our own outages, too: the argument has how many answers the carrier may owe
#: (`Shipment.give_up_after`, counted in `app.temporal.interceptors`). What fails for another reason is repeated without
#: an end.
DISPATCH: Final = ActivityOptions(
    start_to_close_timeout=timedelta(seconds=40),
    retry_policy=RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30)),
)

#: Asking the carrier for the parcel back. As with `DISPATCH`, the argument says whether it can be given up.
RECALL: Final = ActivityOptions(
    start_to_close_timeout=timedelta(seconds=40),
    retry_policy=RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30)),
)

#: How often the carrier may be silent when it is asked for a parcel back after `dispatch` gave up: an hour at least.
#: Patient, because a refund without an answer can cost the goods; not for ever, as the customer waits for the money.
RECALL_SILENCES: Final = 125

#: A pass of `trellis reconcile` over all that was left behind, a heartbeat for each order. The schedule starts the
#: next pass anyway, so this one is given up after a few attempts.
RECONCILE: Final = ActivityOptions(
    start_to_close_timeout=timedelta(hours=1),
    heartbeat_timeout=timedelta(minutes=2),
    retry_policy=RetryPolicy(initial_interval=timedelta(seconds=10), maximum_attempts=5),
)
