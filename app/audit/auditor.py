"""The audit: every order's books against its payment, its timeline, the partners' ledgers and Temporal.

It runs beside a working system. An order that looks wrong is looked at again until it has stopped moving, so that
what is merely under way is not reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from temporalio.service import RPCError

from app.audit.checks import check_books, check_parcel, check_provider
from app.audit.models import Kind, OrderBooks, Page, Report, Violation
from app.errors import CarrierUnavailable, PaymentUnavailable

if TYPE_CHECKING:
    from app.audit.executions import ClosedOrder, Executions
    from app.audit.partners import CarrierBooks, ProviderBooks
    from app.audit.repository import BooksRepository

    _Ask = Callable[[OrderBooks], Awaitable[list[Violation]]]

S = TypeVar("S")
T = TypeVar("T")

_PROVIDER: Final = "the provider"

#: Seconds between two looks at an order that seems wrong. The last one stands.
RECHECKS: Final = (1.0, 2.0, 4.0)

#: Seconds before a source that did not answer is asked again.
ASKED_AGAIN_AFTER: Final = (0.5, 2.0)

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

    def add(self, unanswered: dict[str, int]) -> None:
        for what, times in unanswered.items():
            self.unanswered[what] = self.unanswered.get(what, 0) + times


@dataclass(frozen=True)
class _Finding:
    """A violation, and who has to be asked to see it again; None for the tables alone."""

    violation: Violation
    source: str | None = None

    @property
    def key(self) -> tuple[str, Kind]:
        return self.violation.order_id, self.violation.kind

    @property
    def unconfirmed(self) -> _Finding:
        return _Finding(self.violation.model_copy(update={"unconfirmed": True}), self.source)


@dataclass
class _Look:
    """What was found at one look, whom it could not ask about which order, and which orders it saw."""

    findings: list[_Finding] = field(default_factory=list)
    silent: set[tuple[str, str]] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)

    def still(self, earlier: _Finding) -> _Finding | None:
        """An earlier finding, as it looks now. None: it is no more."""
        for finding in self.findings:
            if finding.key == earlier.key:
                return finding
        order_id = earlier.violation.order_id
        unseen = order_id not in self.seen or (earlier.source and (order_id, earlier.source) in self.silent)
        return earlier.unconfirmed if unseen else None


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
            await self._audit_workflows(report, tally)
        except (RPCError, RuntimeError) as error:
            _count(tally, "Temporal's list of workflows", error)
        report.payments = tally.payments
        report.incomplete = [f"{what}: {times} times" for what, times in sorted(tally.unanswered.items())]
        return report

    async def _audit_orders(self, report: Report, tally: _Tally) -> None:
        async for page in self._books.pages(self._options.since, self._options.page):
            report.orders += len(page.books) + len(page.unreadable)
            look = await self._examine(page, tally)
            found = await self._confirmed(page, look.findings, tally)
            report.violations += [finding.violation for finding in found]

    async def _confirmed(self, page: Page, found: list[_Finding], tally: _Tally) -> list[_Finding]:
        """Those of the findings that are still there when their orders have stopped moving; and, marked, those that
        nobody can say it of, as their source has fallen silent."""
        versions = {books.order_id: books.version for books in page.books}
        silences: dict[str, int] = {}
        for pause in self._options.rechecks:
            if not found:
                break
            await asyncio.sleep(pause)
            again, heard = await self._books.again(sorted({finding.violation.order_id for finding in found})), _Tally()
            look = await self._examine(again, heard)
            found = [still for finding in found if (still := look.still(finding))]
            silences = heard.unanswered
            moved = [books for books in again.books if books.version != versions.get(books.order_id)]
            versions |= {books.order_id: books.version for books in again.books}
            if not moved and not _any_unconfirmed(found):
                break
        if _any_unconfirmed(found):
            tally.add(silences)
        return found

    async def _examine(self, page: Page, tally: _Tally) -> _Look:
        look = _Look()
        for order_id, why in page.unreadable.items():
            look.seen.add(order_id)
            look.findings.append(_Finding(_unreadable(order_id, why)))
        await asyncio.gather(*(self._examine_one(books, look, tally) for books in page.books))
        return look

    async def _examine_one(self, books: OrderBooks, look: _Look, tally: _Tally) -> None:
        look.seen.add(books.order_id)
        try:
            found = [_Finding(violation) for violation in check_books(books, self._options.settle_seconds)]
            async with self._limit:
                for source, ask in self._questions(books):
                    answer = await _answer(tally, source, ask, books)
                    if answer is None:
                        look.silent.add((books.order_id, source))
                    else:
                        tally.payments += source == _PROVIDER
                        found += [_Finding(violation, source) for violation in answer]
        except (ValueError, ArithmeticError) as error:
            # Something that was written by hand, such as an event with an amount that is no number.
            found = [_Finding(_unreadable(books.order_id, type(error).__name__))]
        look.findings += found

    def _questions(self, books: OrderBooks) -> Iterator[tuple[str, _Ask]]:
        """Whom to ask about the order. Each answers with what is wrong."""
        provider, carrier, executions = self._sources.provider, self._sources.carrier, self._sources.executions
        if provider and books.payment_id and books.payment_owner in {None, books.order_id}:
            yield _PROVIDER, partial(_ask_provider, provider, books.payment_id)
        if carrier:
            yield "the carrier", partial(_ask_carrier, carrier)
        if executions and not books.step.final:
            yield "Temporal", partial(_ask_temporal, executions)

    async def _audit_timelines(self, report: Report) -> None:
        async for lost in self._books.without_order():
            report.violations += [_missing(order_id, "its timeline is there") for order_id in lost]

    async def _audit_workflows(self, report: Report, tally: _Tally) -> None:
        """An order was accepted when its workflow had started: one that ended must have left a row."""
        executions = self._sources.executions
        if executions is None:
            return
        page: list[ClosedOrder] = []
        async for order in executions.closed_orders():
            page.append(order)
            if len(page) == self._options.page:
                await self._look_for_rows(executions, report, page, tally)
                page = []
        await self._look_for_rows(executions, report, page, tally)

    async def _look_for_rows(
        self, executions: Executions, report: Report, page: list[ClosedOrder], tally: _Tally
    ) -> None:
        report.workflows += len(page)
        told = {violation.order_id for violation in report.violations if violation.kind is Kind.ORDER_MISSING}
        lost = await self._books.unknown([order.order_id for order in page]) - told
        for order in {order.order_id: order for order in page if order.order_id in lost}.values():
            # Started again since, or reset: then it is a newer run that has to write the order down.
            running = await _answer(tally, "Temporal", executions.running, order.order_id)
            if not running:
                missing = _missing(order.order_id, f"its workflow is {order.status}")
                report.violations.append(missing.model_copy(update={"unconfirmed": running is None}))


async def _ask_provider(provider: ProviderBooks, payment_id: str, books: OrderBooks) -> list[Violation]:
    return list(check_provider(books, await provider.movements(payment_id)))


async def _ask_carrier(carrier: CarrierBooks, books: OrderBooks) -> list[Violation]:
    return list(check_parcel(books, await carrier.parcel(books.order_id)))


async def _ask_temporal(executions: Executions, books: OrderBooks) -> list[Violation]:
    if await executions.running(books.order_id):
        return []
    detail = f"{books.step} for {books.step_seconds:.0f} s"
    return [Violation(kind=Kind.OPEN_WITHOUT_WORKFLOW, order_id=books.order_id, detail=detail)]


def _missing(order_id: str, why: str) -> Violation:
    return Violation(kind=Kind.ORDER_MISSING, order_id=order_id, detail=why)


def _unreadable(order_id: str, why: str) -> Violation:
    return Violation(kind=Kind.UNREADABLE, order_id=order_id, detail=why)


def _any_unconfirmed(found: list[_Finding]) -> bool:
    return any(finding.violation.unconfirmed for finding in found)


async def _answer(tally: _Tally, whom: str, ask: Callable[[S], Awaitable[T]], about: S) -> T | None:
    """The answer, asked for three times; None, counted, when there is none."""
    for pause in (*ASKED_AGAIN_AFTER, None):
        try:
            return await ask(about)
        except _NO_ANSWER as error:
            if pause is None:
                _count(tally, whom, error)
            else:
                await asyncio.sleep(pause)
    return None


def _count(tally: _Tally, whom: str, error: Any) -> None:
    tally.add({f"{whom} did not answer ({type(error).__name__})": 1})
