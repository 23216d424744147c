"""The sandbox partners' own books, in PostgreSQL, in the schema `sandbox`.

They are what the product is audited against: they know nothing of its tables, survive any crash of it, and may
live in another database. Whatever a client did wrong is kept as it happened: a charge that came without an
idempotency key is a row of its own.

Times are the database's (`now()`), so that several processes agree on leases and outages.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import asyncpg

from app.db.pooler import Mode, Pooler
from app.domain import database_url

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

Partner = Literal["payments", "carrier"]
ParcelState = Literal["taken", "recalled"]

#: What the driver raises when the ledger cannot be reached or does not answer in time.
LEDGER_ERRORS: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)

_TABLES: Final = ("idempotency_keys", "charges", "refunds", "parcels", "attempts", "outages")

#: "sandbox" in ASCII, cut to the 63 bits of an advisory lock.
_PREPARE_LOCK: Final = 0x73616E64626F78

_CREATE_TABLES: Final = """
-- One row per idempotency key, written before anything moves.
-- in_flight: the request `owner` works on it. When `locked_until` has passed, that request is taken for dead:
-- it can no longer settle the key, and the next request with the same fingerprint takes the key over.
-- done: `status` and `body` are the answer, replayed for ever; until `locked_until` repeats have to wait.
CREATE TABLE IF NOT EXISTS sandbox.idempotency_keys (
    key          text PRIMARY KEY,
    fingerprint  text NOT NULL,
    owner        uuid NOT NULL,
    state        text NOT NULL DEFAULT 'in_flight' CHECK (state IN ('in_flight', 'done')),
    status       integer,
    body         text,
    locked_until timestamptz NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    CHECK ((state = 'done') = (status IS NOT NULL AND body IS NOT NULL))
);

-- Money taken, one row per movement. `payment` is the merchant's reference and deliberately not unique: a
-- client that forgets the key charges twice, and two rows are how that is found. With a key, the key is unique.
CREATE TABLE IF NOT EXISTS sandbox.charges (
    id              text PRIMARY KEY,
    idempotency_key text UNIQUE,
    payment         text NOT NULL,
    amount          numeric NOT NULL CHECK (amount >= 0),
    currency        text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS charges_payment_idx ON sandbox.charges (payment);

-- Money given back: all of one charge, once.
CREATE TABLE IF NOT EXISTS sandbox.refunds (
    id              text PRIMARY KEY,
    idempotency_key text UNIQUE,
    charge_id       text NOT NULL UNIQUE REFERENCES sandbox.charges (id),
    amount          numeric NOT NULL CHECK (amount >= 0),
    currency        text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    created_at      timestamptz NOT NULL DEFAULT now()
);

-- One row per order the carrier heard of. The first to write it decides: taken or recalled, for ever.
-- `address` is personal data, as a carrier has it; null means the customer picks the parcel up.
CREATE TABLE IF NOT EXISTS sandbox.parcels (
    order_id   text PRIMARY KEY,
    state      text NOT NULL CHECK (state IN ('taken', 'recalled')),
    tracking   text UNIQUE,
    address    jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    CHECK ((state = 'taken') = (tracking IS NOT NULL))
);

-- How often the faulty test ids (`pay-flaky`, zip 00001, ...) were tried; ordinary ids leave no row.
CREATE TABLE IF NOT EXISTS sandbox.attempts (
    operation     text NOT NULL,
    subject       text NOT NULL,
    count         integer NOT NULL DEFAULT 1,
    first_seen_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (operation, subject)
);

-- The outage switch, one row per partner that ever had one.
CREATE TABLE IF NOT EXISTS sandbox.outages (
    partner    text PRIMARY KEY CHECK (partner IN ('payments', 'carrier')),
    down_until timestamptz NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply as it goes over the wire, kept so that it can be given again."""

    status: int
    body: str


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request found when it asked for its idempotency key."""

    key: str
    owner: uuid.UUID
    mine: bool  #: This request may go on, and is the only one.
    same: bool  #: The key stands for the same request.
    wait_seconds: float  #: How long repeats are to wait; 0 or less: no need to.
    answer: Answer | None  #: What was answered before.


@dataclass(frozen=True, slots=True)
class Movement:
    """Money taken or given back."""

    id: str
    idempotency_key: str | None
    payment: str
    amount: Decimal
    currency: str


@dataclass(frozen=True, slots=True)
class Lookup:
    """What is known under an idempotency key."""

    movement: Movement | None
    wait_seconds: float  #: More than 0: a request with this key is in flight and may still move money.


@dataclass(frozen=True, slots=True)
class Parcel:
    """How the race between dispatch and recall of one order went."""

    state: ParcelState
    tracking: str | None
    fresh: bool  #: This very call decided it.


@dataclass(frozen=True, slots=True)
class Attempts:
    """How often something was tried, this time included, and for how long."""

    count: int
    age_seconds: float


def _options(dsn: str, timeout: float, password_file: Path | None = None) -> dict[str, Any]:
    """As the product connects to its own database: a password is not given away here either."""
    options = database_url.read(dsn).for_asyncpg(password_file)
    options["server_settings"] = {"application_name": "trellis-sandbox"} | options["server_settings"]
    return options | {"timeout": timeout, "command_timeout": timeout}


async def prepare(
    dsn: str, *, timeout: float = 10.0, way: Pooler | None = None, password_file: Path | None = None
) -> None:
    """Create schema and tables where they are missing. Several processes may do so at the same moment.

    Needs no right to create anything once they are there.

    Raises:
        asyncpg.InsufficientPrivilegeError: something is missing and the role may not create it.
    """
    connection = await (way or Pooler()).connect(**_options(dsn, timeout, password_file))
    try:
        if await _is_prepared(connection):
            return
        async with connection.transaction():
            # IF NOT EXISTS alone is not enough: two sessions that create the same name still collide.
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _PREPARE_LOCK)
            # Looked up first, because CREATE SCHEMA checks the right to create before it checks for the name.
            if await connection.fetchval("SELECT to_regnamespace('sandbox') IS NULL"):
                await connection.execute("CREATE SCHEMA sandbox")
            await connection.execute(_CREATE_TABLES)
    finally:
        await connection.close(timeout=timeout)


async def _is_prepared(connection: asyncpg.Connection) -> bool:
    found = await connection.fetchval(
        "SELECT count(*) FROM pg_tables WHERE schemaname = 'sandbox' AND tablename = ANY($1)", list(_TABLES)
    )
    return bool(found == len(_TABLES))


class Ledger:
    """The partners' books. Opens at the first question, so that it can be built before the database is up.

    Every method raises one of `LEDGER_ERRORS` when the database does not answer.
    """

    def __init__(
        self,
        dsn: str,
        *,
        lease_seconds: float = 30.0,
        pool_size: int = 5,
        timeout: float = 10.0,
        pooler: Mode = "auto",
        password_file: Path | None = None,
    ) -> None:
        """`lease_seconds`: after this long a request that never settled is taken for dead.
        `timeout`: seconds for connecting, for a free connection and for one statement each.
        `password_file`: read anew for each connection."""
        if lease_seconds <= 0:
            raise ValueError("a lease lasts longer than nothing")
        self._dsn = dsn
        self._password_file = password_file
        self._way = Pooler(pooler)
        self._lease_seconds = lease_seconds
        self._pool_size = pool_size
        self._timeout = timeout
        self._pool: asyncpg.Pool | None = None
        self._opening = asyncio.Lock()

    @classmethod
    async def create(cls, dsn: str, *, lease_seconds: float = 30.0, pool_size: int = 5, timeout: float = 10.0) -> Self:
        """A ledger that is open: schema and tables are there and the database answered."""
        ledger = cls(dsn, lease_seconds=lease_seconds, pool_size=pool_size, timeout=timeout)
        await ledger.open()
        return ledger

    async def open(self) -> None:
        """Prepare the database and open the pool; nothing if that was done."""
        await self._opened()

    async def close(self) -> None:
        """Give all connections back. A later call opens the ledger again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- idempotency ---------------------------------------------------------------------------------------

    async def claim(self, key: str, fingerprint: str) -> Claim:
        """Ask to be the one request that works on `key`. Of any number of simultaneous claims one gets it."""
        owner = uuid.uuid4()
        # now() is the same in the whole statement, so the three decisions below are one.
        row = await self._row(
            """
            INSERT INTO sandbox.idempotency_keys AS kept (key, fingerprint, owner, locked_until)
            VALUES ($1, $2, $3, now() + make_interval(secs => $4))
            ON CONFLICT (key) DO UPDATE SET (owner, locked_until) = (
                SELECT CASE WHEN free THEN excluded.owner ELSE kept.owner END,
                       CASE WHEN free THEN excluded.locked_until ELSE kept.locked_until END
                FROM (SELECT kept.state = 'in_flight' AND kept.locked_until <= now()
                             AND kept.fingerprint = excluded.fingerprint AS free) AS lease
            )
            RETURNING owner = $3 AS mine,
                      fingerprint = $2 AS same,
                      extract(epoch FROM locked_until - now())::float8 AS wait_seconds,
                      status,
                      body
            """,
            key,
            fingerprint,
            owner,
            self._lease_seconds,
        )
        return Claim(
            key=key,
            owner=owner,
            mine=row["mine"],
            same=row["same"],
            wait_seconds=row["wait_seconds"],
            answer=None if row["status"] is None else Answer(row["status"], row["body"]),
        )

    async def forget(self, claim: Claim) -> None:
        """Give the key back as if the request had never come. Does nothing to a key that was settled."""
        await self._row_or_none(
            """
            DELETE FROM sandbox.idempotency_keys WHERE key = $1 AND owner = $2 AND state = 'in_flight'
            RETURNING key
            """,
            claim.key,
            claim.owner,
        )

    async def settle(self, claim: Claim, answer: Answer) -> bool:
        """Keep an answer that moved no money. False: the lease ran out, the key is no longer ours."""
        row = await self._row_or_none(
            """
            UPDATE sandbox.idempotency_keys SET state = 'done', status = $3, body = $4, locked_until = now()
            WHERE key = $1 AND owner = $2 AND state = 'in_flight' AND locked_until > now()
            RETURNING key
            """,
            claim.key,
            claim.owner,
            answer.status,
            answer.body,
        )
        return row is not None

    # --- money ---------------------------------------------------------------------------------------------

    async def record_charge(
        self, charge: Movement, claim: Claim | None, answer: Answer, hold_seconds: float = 0.0
    ) -> bool:
        """Take the money and settle the key, both or neither. Without a claim the money just moves.

        Repeats are told to wait for `hold_seconds` more. False: the lease ran out and nothing moved.
        """
        row = await self._row_or_none(
            """
            WITH settled AS (
                UPDATE sandbox.idempotency_keys
                SET state = 'done', status = $7, body = $8, locked_until = now() + make_interval(secs => $9)
                WHERE key = $2 AND owner = $6 AND state = 'in_flight' AND locked_until > now()
                RETURNING key
            )
            INSERT INTO sandbox.charges (id, idempotency_key, payment, amount, currency)
            SELECT $1, $2, $3, $4, $5
            WHERE $2::text IS NULL OR EXISTS (SELECT FROM settled)
            RETURNING id
            """,
            charge.id,
            charge.idempotency_key,
            charge.payment,
            charge.amount,
            charge.currency,
            None if claim is None else claim.owner,
            answer.status,
            answer.body,
            hold_seconds,
        )
        return row is not None

    async def record_refund(
        self, refund: Movement, charge_id: str, claim: Claim | None, answer: Answer, hold_seconds: float = 0.0
    ) -> bool:
        """Give a charge back and settle the key, both or neither; as `record_charge`.

        Raises:
            asyncpg.UniqueViolationError: another refund of this charge was faster.
        """
        row = await self._row_or_none(
            """
            WITH settled AS (
                UPDATE sandbox.idempotency_keys
                SET state = 'done', status = $7, body = $8, locked_until = now() + make_interval(secs => $9)
                WHERE key = $2 AND owner = $6 AND state = 'in_flight' AND locked_until > now()
                RETURNING key
            )
            INSERT INTO sandbox.refunds (id, idempotency_key, charge_id, amount, currency)
            SELECT $1, $2, $3, $4, $5
            WHERE $2::text IS NULL OR EXISTS (SELECT FROM settled)
            RETURNING id
            """,
            refund.id,
            refund.idempotency_key,
            charge_id,
            refund.amount,
            refund.currency,
            None if claim is None else claim.owner,
            answer.status,
            answer.body,
            hold_seconds,
        )
        return row is not None

    async def refundable(self, payment: str) -> tuple[Movement, bool] | None:
        """The charge a refund of `payment` is for, and whether it was refunded before.

        The oldest one that was not; if all were, the oldest. None: nothing was charged.
        """
        row = await self._row_or_none(
            """
            SELECT charge.id, charge.idempotency_key, charge.payment, charge.amount, charge.currency,
                   refund.id IS NOT NULL AS refunded
            FROM sandbox.charges AS charge LEFT JOIN sandbox.refunds AS refund ON refund.charge_id = charge.id
            WHERE charge.payment = $1
            ORDER BY refund.id IS NOT NULL, charge.created_at, charge.id
            LIMIT 1
            """,
            payment,
        )
        return None if row is None else (_movement(row), row["refunded"])

    async def find_charge(self, key: str, at_least_old: float = 0.0) -> Lookup:
        """The charge made with this idempotency key, if it is so many seconds old."""
        # One statement, one snapshot: a charge that settles meanwhile is either still in flight or there.
        row = await self._row(
            """
            SELECT charge.id, charge.idempotency_key, charge.payment, charge.amount, charge.currency,
                   coalesce(extract(epoch FROM pending.locked_until - now()), 0)::float8 AS wait_seconds
            FROM (SELECT $1::text AS key) AS asked
            LEFT JOIN sandbox.charges AS charge
                ON charge.idempotency_key = asked.key AND charge.created_at <= now() - make_interval(secs => $2)
            LEFT JOIN sandbox.idempotency_keys AS pending
                ON pending.key = asked.key AND pending.state = 'in_flight'
            """,
            key,
            at_least_old,
        )
        return Lookup(None if row["id"] is None else _movement(row), row["wait_seconds"])

    async def find_refund(self, key: str) -> Lookup:
        """The refund made with this idempotency key."""
        row = await self._row(
            """
            SELECT refund.id, refund.idempotency_key, charge.payment, refund.amount, refund.currency,
                   coalesce(extract(epoch FROM pending.locked_until - now()), 0)::float8 AS wait_seconds
            FROM (SELECT $1::text AS key) AS asked
            LEFT JOIN sandbox.refunds AS refund ON refund.idempotency_key = asked.key
            LEFT JOIN sandbox.charges AS charge ON charge.id = refund.charge_id
            LEFT JOIN sandbox.idempotency_keys AS pending
                ON pending.key = asked.key AND pending.state = 'in_flight'
            """,
            key,
        )
        return Lookup(None if row["id"] is None else _movement(row), row["wait_seconds"])

    async def charges_of(self, payment: str) -> list[Movement]:
        """Every charge under a payment reference, oldest first."""
        rows = await self._rows(
            """
            SELECT id, idempotency_key, payment, amount, currency FROM sandbox.charges
            WHERE payment = $1 ORDER BY created_at, id
            """,
            payment,
        )
        return [_movement(row) for row in rows]

    async def refunds_of(self, payment: str) -> list[Movement]:
        """Every refund of a charge under a payment reference, oldest first."""
        rows = await self._rows(
            """
            SELECT refund.id, refund.idempotency_key, charge.payment, refund.amount, refund.currency
            FROM sandbox.refunds AS refund JOIN sandbox.charges AS charge ON charge.id = refund.charge_id
            WHERE charge.payment = $1 ORDER BY refund.created_at, refund.id
            """,
            payment,
        )
        return [_movement(row) for row in rows]

    # --- parcels -------------------------------------------------------------------------------------------

    async def take_parcel(self, order_id: str, tracking: str, address_json: str | None) -> Parcel:
        """Take the parcel, unless the order was decided before."""
        # The update changes nothing; it makes the row that was there lockable and returnable.
        row = await self._row(
            """
            INSERT INTO sandbox.parcels AS kept (order_id, state, tracking, address)
            VALUES ($1, 'taken', $2, $3::jsonb)
            ON CONFLICT (order_id) DO UPDATE SET state = kept.state
            RETURNING state, tracking, tracking IS NOT DISTINCT FROM $2 AS fresh
            """,
            order_id,
            tracking,
            address_json,
        )
        return Parcel(row["state"], row["tracking"], row["fresh"])

    async def recall_parcel(self, order_id: str) -> Parcel:
        """Recall the parcel, unless it was taken."""
        row = await self._row(
            """
            INSERT INTO sandbox.parcels AS kept (order_id, state) VALUES ($1, 'recalled')
            ON CONFLICT (order_id) DO UPDATE SET state = kept.state
            RETURNING state, tracking
            """,
            order_id,
        )
        return Parcel(row["state"], row["tracking"], fresh=False)

    async def find_parcel(self, order_id: str) -> tuple[Parcel, str | None] | None:
        """What became of the parcel, with the address it was sent to as JSON."""
        row = await self._row_or_none(
            "SELECT state, tracking, address::text FROM sandbox.parcels WHERE order_id = $1", order_id
        )
        return None if row is None else (Parcel(row["state"], row["tracking"], fresh=False), row["address"])

    # --- faults on demand ----------------------------------------------------------------------------------

    async def count_attempt(self, operation: str, subject: str) -> Attempts:
        """Count one more try of a faulty test id."""
        row = await self._row(
            """
            INSERT INTO sandbox.attempts AS kept (operation, subject) VALUES ($1, $2)
            ON CONFLICT (operation, subject) DO UPDATE SET count = kept.count + 1
            RETURNING count, extract(epoch FROM now() - first_seen_at)::float8 AS age_seconds
            """,
            operation,
            subject,
        )
        return Attempts(row["count"], row["age_seconds"])

    async def set_outage(self, partner: Partner, seconds: float) -> None:
        """Let the partner answer nothing but 503 for so long, in every process; 0 ends it."""
        await self._row(
            """
            INSERT INTO sandbox.outages (partner, down_until) VALUES ($1, now() + make_interval(secs => $2))
            ON CONFLICT (partner) DO UPDATE SET down_until = excluded.down_until
            RETURNING partner
            """,
            partner,
            seconds,
        )

    async def outage_left(self, partner: Partner) -> float:
        """Seconds until the outage ends; 0 if there is none."""
        row = await self._row_or_none(
            """
            SELECT greatest(extract(epoch FROM down_until - now()), 0)::float8 AS left_seconds
            FROM sandbox.outages WHERE partner = $1
            """,
            partner,
        )
        return 0.0 if row is None else float(row["left_seconds"])

    # --- plumbing ------------------------------------------------------------------------------------------

    async def _opened(self) -> asyncpg.Pool:
        if self._pool is not None:
            return self._pool
        # The limit includes the wait for the lock: all who wait for a silent database give up together.
        async with asyncio.timeout(self._timeout), self._opening:
            if self._pool is None:
                await prepare(self._dsn, timeout=self._timeout, way=self._way, password_file=self._password_file)
                self._pool = await asyncpg.create_pool(
                    min_size=0,
                    max_size=self._pool_size,
                    reset=_keep,
                    connect=self._way.connect,
                    **_options(self._dsn, self._timeout, self._password_file),
                )
            return self._pool

    async def _rows(self, sql: str, *values: object) -> list[asyncpg.Record]:
        pool = await self._opened()
        async with pool.acquire(timeout=self._timeout) as connection:
            return await connection.fetch(sql, *values)

    async def _row_or_none(self, sql: str, *values: object) -> asyncpg.Record | None:
        pool = await self._opened()
        async with pool.acquire(timeout=self._timeout) as connection:
            return await connection.fetchrow(sql, *values)

    async def _row(self, sql: str, *values: object) -> asyncpg.Record:
        row = await self._row_or_none(sql, *values)
        if row is None:
            raise asyncpg.InterfaceError("a statement that always answers a row answered none")
        return row


def _movement(row: asyncpg.Record) -> Movement:
    return Movement(row["id"], row["idempotency_key"], row["payment"], row["amount"], row["currency"])


async def _keep(connection: Any) -> None:
    """The pool's reset: none. Each use is one statement, which leaves nothing behind in the session."""
