"""The audit: every order's books against its payment, its timeline, the partners' ledgers and Temporal.

It runs beside a working system. An order that looks wrong is looked at again until it has stopped moving, so that
what is merely under way is not reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

from temporalio.service import RPCError

from app.audit.checks import check_books, check_parcel, check_provider
from app.audit.models import Kind, OrderBooks, Report, Violation
from app.errors import CarrierUnavailable, PaymentUnavailable

if TYPE_CHECKING:
    from app.audit.executions import ClosedOrder, Executions
    from app.audit.partners import CarrierBooks, ProviderBooks
    from app.audit.repository import BooksRepository

T = TypeVar("T")

#: Seconds between two looks at an order that seems wrong. The last one stands.
RECHECKS: Final = (1.0, 2.0, 4.0)

_NO_ANSWER: Final = (PaymentUnavailable, CarrierUnavailable, RPCError, RuntimeError)


@dataclass(frozen=True)
class Options:
    """How far an audit goes."""

    since: datetime | None = None
    page: int = 500
    parallel: int = 10
    settle_seconds: float = 900.0
    rechecks: Sequence[float] = RECHECKS


@dataclass(frozen=True)
class Sources:
    """Whom an audit asks besides the product's tables. None is not asked."""

    executions: Executions | None = None
    provider: ProviderBooks | None = None
    carrier: CarrierBooks | None = None


@dataclass
class _Tally:
    payments: int = 0
    unanswered: dict[str, int] = field(default_factory=dict)


class Auditor:
    """Compares, page by page; holds one page at a time, however large the database."""

    def __init__(self, books: BooksRepository, sources: Sources, options: Options | None = None) -> None:
        self._books = books
        self._sources = sources
        self._options = options or Options()
        self._limit = asyncio.Semaphore(self._options.parallel)

    async def run(self) -> Report:
        """The whole audit.

        Raises:
            Exception: PostgreSQL does not answer: an error of `db.UNAVAILABLE`.
        """
        report, tally = Report(), _Tally()
        await self._audit_orders(report, tally)
        await self._audit_timelines(report)
        try:
            await self._audit_workflows(report)
        except (RPCError, RuntimeError) as error:
            _count(tally, "Temporal's list of workflows", error)
        report.payments = tally.payments
        report.incomplete = [f"{what}: {times} times" for what, times in sorted(tally.unanswered.items())]
        return report

    async def _audit_orders(self, report: Report, tally: _Tally) -> None:
        after = ""
        while page := await self._books.page(after, self._options.since, self._options.page):
            after = page[-1].order_id
            report.orders += len(page)
            found = await self._examine(page, tally)
            report.violations += await self._confirmed(page, found)

    async def _confirmed(self, page: list[OrderBooks], found: list[Violation]) -> list[Violation]:
        """Those of the findings that are still there when their orders have stopped moving."""
        versions = {books.order_id: books.version for books in page}
        for pause in self._options.rechecks:
            if not found:
                break
            await asyncio.sleep(pause)
            again = await self._books.again(sorted({violation.order_id for violation in found}))
            before = {(violation.order_id, violation.kind) for violation in found}
            found = [
                violation
                for violation in await self._examine(again, _Tally())
                if (violation.order_id, violation.kind) in before
            ]
            moved = [books for books in again if books.version != versions[books.order_id]]
            versions |= {books.order_id: books.version for books in again}
            if not moved:
                break
        return found

    async def _examine(self, page: list[OrderBooks], tally: _Tally) -> list[Violation]:
        answers = await asyncio.gather(*(self._examine_one(books, tally) for books in page))
        return [violation for answer in answers for violation in answer]

    async def _examine_one(self, books: OrderBooks, tally: _Tally) -> list[Violation]:
        found = list(check_books(books, self._options.settle_seconds))
        async with self._limit:
            if self._sources.provider and books.payment_id and books.payment_owner in {None, books.order_id}:
                moved = await _answer(tally, "the provider", self._sources.provider.movements, books.payment_id)
                tally.payments += moved is not None
                found += check_provider(books, moved) if moved else []
            if self._sources.carrier:
                parcel = await _answer(tally, "the carrier", self._sources.carrier.parcel, books.order_id)
                found += check_parcel(books, parcel) if parcel else []
            if self._sources.executions and not books.step.final:
                running = await _answer(tally, "Temporal", self._sources.executions.running, books.order_id)
                if running is False:
                    detail = f"{books.step} for {books.step_seconds:.0f} s"
                    found.append(Violation(kind=Kind.OPEN_WITHOUT_WORKFLOW, order_id=books.order_id, detail=detail))
        return found

    async def _audit_timelines(self, report: Report) -> None:
        after = ""
        while lost := await self._books.without_order(after, self._options.page):
            after = lost[-1]
            report.violations += [_missing(order_id, "its timeline is there") for order_id in lost]

    async def _audit_workflows(self, report: Report) -> None:
        """An order was accepted when its workflow had started: one that ended must have left a row."""
        if self._sources.executions is None:
            return
        page: list[ClosedOrder] = []
        async for order in self._sources.executions.closed_orders():
            page.append(order)
            if len(page) == self._options.page:
                await self._look_for_rows(report, page)
                page = []
        await self._look_for_rows(report, page)

    async def _look_for_rows(self, report: Report, page: list[ClosedOrder]) -> None:
        report.workflows += len(page)
        told = {violation.order_id for violation in report.violations if violation.kind is Kind.ORDER_MISSING}
        lost = await self._books.unknown([order.order_id for order in page]) - told
        report.violations += [
            _missing(order.order_id, f"its workflow is {order.status}") for order in page if order.order_id in lost
        ]


def _missing(order_id: str, why: str) -> Violation:
    return Violation(kind=Kind.ORDER_MISSING, order_id=order_id, detail=why)


async def _answer(tally: _Tally, whom: str, ask: Callable[[str], Awaitable[T]], about: str) -> T | None:
    """The answer, asked for three times; None, counted, when there is none."""
    for pause in (0.5, 2.0, None):
        try:
            return await ask(about)
        except _NO_ANSWER as error:
            if pause is None:
                _count(tally, whom, error)
            else:
                await asyncio.sleep(pause)
    return None


def _count(tally: _Tally, whom: str, error: Any) -> None:
    what = f"{whom} did not answer ({type(error).__name__})"
    tally.unanswered[what] = tally.unanswered.get(what, 0) + 1
