"""The timeline, and the one way an order changes its state: together, in one transaction.

Every function takes the connection of the caller's transaction, or the pool where its one statement is all that there
is to write; apart from `AttemptLog`, which tells of attempts whose own transaction is gone. Each happening has a `key`;
the same key is written once, so a retried activity adds nothing twice. The order's row is locked before the event gets
its id, so ids follow the commits of an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from app.domain.steps import FINAL_STEPS, Step, steps_before
from app.errors import IllegalTransition

if TYPE_CHECKING:
    import asyncpg

    from app.db.pool import Connection


def moving(*, sets: str = "", when: str = "true", before: str = "", after: str = "") -> str:
    """The statement that moves an order and tells of it, for `enter`: text for a module's constants.

    One statement is one transaction and one round trip; `BEGIN`, two statements and `COMMIT` are four. What a feature
    has to write in the same transaction goes in here, with arguments from `$6` on.

    Args:
        sets: further columns of the order to set, such as `, tracking = $6`.
        when: a further condition of the move.
        before: a part that comes before the move, such as `claimed AS (INSERT ...)`; it can read `was`, the order's
            row, which is locked.
        after: a part that is carried out if the order moves: it is to read `moved`.
    """
    return f"""
WITH was AS (
    SELECT id, state, state_since FROM orders WHERE id = $1 FOR NO KEY UPDATE
){f", {before}" if before else ""}, moved AS (
    UPDATE orders SET state = $2, state_since = clock_timestamp(), last_error = $5{sets}
    FROM was WHERE orders.id = was.id AND was.state = ANY($3) AND {when}
    RETURNING orders.id, was.state AS left_step, extract(epoch FROM orders.state_since - was.state_since) AS seconds
), told AS (
    INSERT INTO events (order_id, type, payload_json, key) SELECT id, $2, $4, $2 FROM moved
){f", {after}" if after else ""}
SELECT left_step, seconds FROM moved
"""  # noqa: S608 - put together from literals alone, when a module is loaded


_ENTER: Final = moving()

_ENTERED_BEFORE = "SELECT EXISTS (SELECT FROM events WHERE order_id = $1 AND key = $2)"

_RECORD = """
WITH known AS (
    SELECT id FROM orders WHERE id = $1 FOR NO KEY UPDATE
)
INSERT INTO events (order_id, type, payload_json, key) SELECT id, $2, $3, $4 FROM known
ON CONFLICT (order_id, key) DO NOTHING
"""

_FAILED = """
WITH known AS (
    SELECT id FROM orders WHERE id = $1 FOR NO KEY UPDATE
), failing AS (
    UPDATE orders SET last_error = $4 FROM known WHERE orders.id = known.id AND NOT (state = ANY($6))
)
INSERT INTO events (order_id, type, payload_json, key) SELECT id, $2, $3, $5 FROM known
ON CONFLICT (order_id, key) DO NOTHING
"""

_RETRIED = """
WITH known AS (
    SELECT id FROM orders WHERE id = $1 FOR NO KEY UPDATE
), failed AS (
    SELECT payload_json ->> 'error_type' AS error_type FROM events WHERE order_id = $1 AND key = $5
)
INSERT INTO events (order_id, type, payload_json, key)
SELECT id, $2, $3::jsonb || jsonb_build_object('error_type', coalesce((SELECT error_type FROM failed), 'TimedOut')), $4
FROM known
ON CONFLICT (order_id, key) DO NOTHING
"""

_RECOVERED = "UPDATE orders SET last_error = NULL WHERE id = $1 AND last_error IS NOT NULL AND NOT (state = ANY($2))"


@dataclass(frozen=True)
class Move:
    """A move that was made: the step that was left, and the seconds the order had spent in it."""

    left: Step
    seconds: float


async def enter(
    connection: Connection | asyncpg.Pool,
    order_id: str,
    step: Step,
    payload: dict[str, Any] | None = None,
    *,
    error: str | None = None,
    by: str = _ENTER,
    arguments: Sequence[Any] = (),
) -> Move | None:
    """Move the order to `step` and tell of it, once. None when it had entered the step before.

    Args:
        connection: of the caller's transaction; or the pool, where there is no more to write than this.
        error: becomes the order's `last_error`; without one, the success clears it.
        by: a statement made by `moving`, with its own `arguments`.

    Raises:
        IllegalTransition: the order is unknown, or is at a step from which there is no way to this one.
    """
    move = await try_to_enter(connection, order_id, step, payload, error=error, by=by, arguments=arguments)
    if move is None:
        await require_entered(connection, order_id, step)
    return move


async def try_to_enter(
    connection: Connection | asyncpg.Pool,
    order_id: str,
    step: Step,
    payload: dict[str, Any] | None = None,
    *,
    error: str | None = None,
    by: str = _ENTER,
    arguments: Sequence[Any] = (),
) -> Move | None:
    """The same, for a caller that has its own questions when nothing was moved, which is None."""
    moved = await connection.fetchrow(by, order_id, step, steps_before(step), payload or {}, error, *arguments)
    return Move(Step(moved["left_step"]), float(moved["seconds"])) if moved else None


async def require_entered(connection: Connection | asyncpg.Pool, order_id: str, step: Step) -> None:
    """Raises `IllegalTransition` unless the order has entered `step` before."""
    if not await connection.fetchval(_ENTERED_BEFORE, order_id, step):
        state = await connection.fetchval("SELECT state FROM orders WHERE id = $1", order_id)
        raise IllegalTransition(f"{order_id} from {state or 'nowhere'} to {step}")


async def lock(connection: Connection, order_id: str) -> None:
    """Let nobody else move the order or tell of it before this transaction ends."""
    await connection.execute("SELECT FROM orders WHERE id = $1 FOR NO KEY UPDATE", order_id)


async def record(
    connection: Connection | asyncpg.Pool, order_id: str, event: str, payload: dict[str, Any], *, key: str
) -> None:
    """Tell of something that is not a step, once per `key`. An unknown order has no timeline: nothing is told."""
    await connection.execute(_RECORD, order_id, event, payload, key)


@dataclass(frozen=True)
class Attempt:
    """One attempt of one activity of one order."""

    order_id: str
    activity: str
    activity_id: str
    run_id: str
    number: int

    def key(self, happening: str, number: int | None = None) -> str:
        """The event key of something that happened to this attempt, or to attempt `number` of the activity."""
        return f"{happening}:{self.run_id}:{self.activity_id}:{number or self.number}"


class AttemptLog:
    """Tells of failed and repeated attempts in the timeline while they happen, in transactions of its own."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def failed(self, attempt: Attempt, error_type: str, message: str, *, retryable: bool) -> None:
        """An event `attempt_failed`, and `last_error` for as long as the order is not closed."""
        payload = {
            "activity": attempt.activity,
            "attempt": attempt.number,
            "error_type": error_type,
            "message": message,
            "retryable": retryable,
        }
        await self._pool.execute(
            _FAILED,
            attempt.order_id,
            "attempt_failed",
            payload,
            message,
            attempt.key("failed"),
            list(FINAL_STEPS),
        )

    async def retried(self, attempt: Attempt) -> None:
        """An event `attempt_retried` with the error type of the attempt before. `TimedOut` when that left no word:
        it ran out of time, or its worker died."""
        await self._pool.execute(
            _RETRIED,
            attempt.order_id,
            "attempt_retried",
            {"activity": attempt.activity, "attempt": attempt.number},
            attempt.key("retried"),
            attempt.key("failed", attempt.number - 1),
        )

    async def recovered(self, attempt: Attempt) -> None:
        """Clear `last_error` after a success that moved nothing."""
        await self._pool.execute(_RECOVERED, attempt.order_id, list(FINAL_STEPS))
