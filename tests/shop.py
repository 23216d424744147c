"""The product without HTTP, for tests of the workflows: both workers, the service and the books, on real servers.

One shop serves a whole test module, because orders do not disturb each other; a test opens its own when it stops
workers or needs other settings.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client, WorkflowHandle

from app import workers
from app.domain.steps import Step
from app.order.models import Event, OrderResult, StartOrder, order_workflow_id
from app.order.repository import OrderRepository
from app.order.service import OrderService
from app.order.workflows import OrderWorkflow
from app.payment.http_gateway import HttpPaymentGateway
from app.sandbox.app import create_sandbox
from app.sandbox.ledger import Ledger, Partner
from app.sandbox.protocol import Faults
from app.services import Services, open_services
from app.settings import Settings
from app.shipping.http_carrier import HttpCarrier
from app.shipping.models import Address, shipping_workflow_id
from app.temporal.worker import WorkerPart
from app.workers import order_worker, shipping_worker
from tests import books, databases
from tests.support import activities_of, until

#: Seconds a test waits for what must happen; far more than it takes, because the machine may be busy.
PATIENCE = 30.0

HOME = Address(line1="1 Main St", city="Springfield", state="IL", zip="62701")
OFFICE = Address(line1="9 Side St", city="Shelbyville", state="IL", zip="62565")


def at_zip(zip_code: str) -> Address:
    """An address that differs from `HOME` in its zip code only, by which the sandbox's carrier goes."""
    return HOME.model_copy(update={"zip": zip_code})


#: Nobody takes a parcel to the first, answers to the second, or is heard to answer to the third, where it is taken.
REFUSED, UNANSWERED, UNHEARD = at_zip("00002"), at_zip("00005"), at_zip("00006")


@dataclass(frozen=True)
class Order:
    """One order in a shop."""

    id: str
    shop: Shop
    payment_id: str

    @property
    def workflow(self) -> WorkflowHandle[OrderWorkflow, OrderResult]:
        """The order's workflow."""
        return self.shop.client.get_workflow_handle_for(OrderWorkflow.run, order_workflow_id(self.id))

    @property
    def shipment(self) -> WorkflowHandle[Any, Any]:
        """The shipment's workflow, once it was started."""
        return self.shop.client.get_workflow_handle(shipping_workflow_id(self.id))

    # --- what people do

    async def approve(self) -> None:
        """Signal an approval."""
        await self.shop.service.approve(self.id)

    async def cancel(self) -> None:
        """Signal a cancellation."""
        await self.shop.service.cancel(self.id)

    async def send_to(self, address: Address) -> None:
        """Signal a new address."""
        await self.shop.service.signal_address(self.id, address)

    # --- what became of it

    async def ends(self) -> Step:
        """Wait for the end of the workflow; the tables must agree with it."""
        async with asyncio.timeout(PATIENCE * 2):
            result = await self.workflow.result()
        assert (await self.status())[0] is result.step
        return result.step

    async def status(self) -> tuple[Step | None, str | None]:
        """Step and last error as the tables have them."""
        found = await self.shop.repository.status(self.id)
        return (found.step, found.last_error) if found else (None, None)

    async def reaches(self, *steps: Step) -> Step:
        """Wait until the order is at one of `steps`."""

        async def there() -> Step | None:
            step, _ = await self.status()
            if step is not None and step.final and step not in steps:
                pytest.fail(f"{self.id} ended {step} instead of reaching {' or '.join(steps)}")
            return step if step in steps else None

        step: Step = await until(there, f"{self.id} to reach {' or '.join(steps)}")
        return step

    async def events(self, *types: str) -> list[Event]:
        """The timeline, or what it has of these types."""
        found = (await self.shop.repository.events(self.id)).events
        return [event for event in found if event.type in types] if types else found

    async def tells(self, event: str, times: int = 1) -> list[Event]:
        """Wait until the timeline has this event so many times."""

        async def told() -> list[Event] | None:
            found = await self.events(event)
            return found if len(found) >= times else None

        found: list[Event] = await until(told, f"{times} x {event} of {self.id}")
        return found

    async def path(self) -> list[str]:
        """The steps it entered, in order."""
        return [event.type for event in await self.events() if event.type in set(Step)]

    async def history(self) -> list[HistoryEvent]:
        """What Temporal recorded."""
        return [event async for event in self.workflow.fetch_history_events()]

    async def activities(self) -> list[str]:
        """The activities it carried out, in order."""
        return activities_of(await self.history())

    async def recorded(self, kind: EventType.ValueType, times: int = 1) -> list[HistoryEvent]:
        """Wait until Temporal has recorded so many events of this kind."""

        async def there() -> list[HistoryEvent] | None:
            found = [event for event in await self.history() if event.event_type == kind]
            return found if len(found) >= times else None

        found: list[HistoryEvent] = await until(there, f"{times} x {EventType.Name(kind)} in {self.id}")
        return found


@dataclass
class Shop:
    """Where orders are placed."""

    services: Services
    ledger: Ledger
    #: Idempotency keys of requests whose replies are kept back.
    withheld: dict[str, asyncio.Event] = field(default_factory=dict)
    running: list[asyncio.Task[None]] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.repository = OrderRepository(self.pool)
        self.service = OrderService(self.services.settings, self.repository, self.client)

    @property
    def settings(self) -> Settings:
        """The shop's settings."""
        return self.services.settings

    @property
    def client(self) -> Client:
        """Its connection to Temporal."""
        return self.services.temporal

    @property
    def pool(self) -> asyncpg.Pool:
        """Its connections to PostgreSQL."""
        return self.services.pool

    def parts(self) -> list[WorkerPart]:
        """What its two workers serve."""
        return [order_worker(self.services), shipping_worker(self.services)]

    async def open(self, *, parts: Sequence[WorkerPart] | None = None, **settings: Any) -> None:
        """Start workers: both, as the product does, unless told otherwise; beside those that run, if any do."""
        services = replace(self.services, settings=self.settings.model_copy(update=settings))
        if not self.running:
            self._stop = asyncio.Event()
        self.running.append(asyncio.create_task(workers.run(services, parts or self.parts(), self._stop)))

    async def close(self) -> None:
        """Stop the workers; orders rest where they are."""
        self._stop.set()
        await asyncio.gather(*self.running)
        self.running = []

    @asynccontextmanager
    async def serving(self, working: bool = True, **settings: Any) -> AsyncIterator[None]:
        """Workers, while the block runs."""
        if working:
            await self.open(**settings)
        try:
            yield
        finally:
            if self.running:
                await self.close()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """No workers while the block runs, and new ones afterwards: what is placed and signalled waits for them."""
        await self.close()
        try:
            yield
        finally:
            await self.open()

    @asynccontextmanager
    async def without_shipping(self) -> AsyncIterator[None]:
        """Nobody works on shipments while the block runs."""
        orders, shipments = self.parts()
        await self.close()
        await self.open(parts=[orders])
        try:
            yield
        finally:
            await self.open(parts=[shipments])

    async def order(
        self,
        payment: str = "pay",
        *,
        address: Address | None = HOME,
        review: int | None = 60,
        attempts: int | None = None,
        local_steps: bool | None = None,
        after_review: str | None = None,
        **more: Any,
    ) -> Order:
        """Place an order, as the API does. `payment` is a name that the sandbox knows, or any other; `attempts` are
        those at handing the parcel over; `local_steps` is the setting, `after_review` that of a new address."""
        # "pay-slow" becomes "pay-slow-1a2b": the sandbox goes by the first part, and no two orders share an id.
        unique = uuid.uuid4().hex[:10]
        order = Order(f"o-{unique}", self, f"{payment}-{unique}")
        request = StartOrder(payment_id=order.payment_id, address=address, review_timeout_seconds=review, **more)
        changes = {"dispatch_attempts": attempts, "local_steps": local_steps, "address_after_review": after_review}
        chosen = self.settings.model_copy(update={name: new for name, new in changes.items() if new is not None})
        await OrderService(chosen, self.repository, self.client).start(order.id, request)
        return order

    async def orders_with_one_payment(self) -> tuple[Order, Order]:
        """Two orders that name the same payment: started at the same moment, they get past the API's look at the
        tables, which hold neither of them yet."""
        unique = uuid.uuid4().hex[:10]
        first, second = (Order(f"o-{unique}-{name}", self, f"pay-{unique}") for name in "ab")
        async with self.closed():
            for order in (first, second):
                await self.service.start(order.id, StartOrder(payment_id=order.payment_id, review_timeout_seconds=60))
        return first, second

    async def approved(self, payment: str = "pay", **more: Any) -> Order:
        """Place an order whose approval is there before its review opens."""
        order = await self.order(payment, **more)
        await order.approve()
        return order

    @asynccontextmanager
    async def locked(self, order: Order) -> AsyncIterator[None]:
        """Nothing more is written down of the order while the block runs: its activities wait, and are not repeated
        as long as that takes less than the time limit of a statement."""
        connection = await asyncpg.connect(self.settings.database_url.get_secret_value())
        try:
            async with connection.transaction():
                await connection.execute("SELECT FROM orders WHERE id = $1 FOR UPDATE", order.id)
                yield
        finally:
            await connection.close()

    @asynccontextmanager
    async def withholding(self, key: str) -> AsyncIterator[None]:
        """Partners do what is asked of them under this key, a payment or order id, and their replies are on the way
        while the block runs."""
        self.withheld[key] = asyncio.Event()
        try:
            yield
        finally:
            self.withheld.pop(key).set()

    async def charged(self, order: Order) -> None:
        """Wait until the provider has taken the money."""
        await until(lambda: self.ledger.charges_of(order.payment_id), f"the charge of {order.id}")

    async def taken(self, order: Order) -> None:
        """Wait until the carrier has the parcel."""
        await until(lambda: self.ledger.find_parcel(order.id), f"the parcel of {order.id}")

    @asynccontextmanager
    async def outage(self, partner: Partner) -> AsyncIterator[None]:
        """The partner answers nothing but 503 while the block runs."""
        await self.ledger.set_outage(partner, 3600)
        try:
            yield
        finally:
            await self.ledger.set_outage(partner, 0)

    async def audit(self, **options: Any) -> None:
        """Every invariant, for every order that this shop ever had."""
        problems = await books.audit(self.pool, temporal=self.client, **options)
        assert not problems, "\n".join(problems)


@asynccontextmanager
async def open_shop(settings: Settings, *, working: bool = True, client: Client | None = None) -> AsyncIterator[Shop]:
    """A shop on these settings, with its workers unless told otherwise; `client` to watch it with another one."""
    async with open_services(settings) as services, Ledger(settings.database_url.get_secret_value()) as ledger:
        # The partners' tables are there before the first of them is asked, for tests that look or break things first.
        await ledger.open()
        withheld: dict[str, asyncio.Event] = {}
        async with _partners(ledger, withheld) as partners:
            shop = Shop(
                replace(
                    services,
                    temporal=client or services.temporal,
                    gateway=HttpPaymentGateway(partners["/payments"]),
                    carrier=HttpCarrier(partners["/carrier"]),
                ),
                ledger,
                withheld,
            )
            with _quiet_sdk():
                async with shop.serving(working):
                    yield shop


@contextmanager
def _quiet_sdk() -> Iterator[None]:
    """As in the product: a failed attempt is told by its own log line, without the SDK's traceback."""
    sdk = logging.getLogger("temporalio.activity")
    level = sdk.level
    sdk.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sdk.setLevel(level)


@asynccontextmanager
async def _partners(ledger: Ledger, withheld: dict[str, asyncio.Event]) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """Clients of the sandbox as the wiring makes them, but of one that tires sooner of being slow, flaky or down."""
    sandbox = create_sandbox(ledger, faults=Faults(flaky_failures=1, slow_seconds=1.0, down_seconds=1.0))
    transport = httpx.ASGITransport(app=sandbox, raise_app_exceptions=False)

    async def wait_if_withheld(response: httpx.Response) -> None:
        released = withheld.get(response.request.headers.get("Idempotency-Key", ""))
        if released is not None:
            await released.wait()

    async with AsyncExitStack() as stack:
        yield {
            path: await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=f"http://sandbox{path}",
                    transport=transport,
                    timeout=10,
                    event_hooks={"response": [wait_if_withheld]},
                )
            )
            for path in ("/payments", "/carrier")
        }


@asynccontextmanager
async def fresh_settings(servers: Any, template: str, **more: Any) -> AsyncIterator[Settings]:
    """Settings with a database and task queues of their own, for as long as the block runs."""
    unique = uuid.uuid4().hex[:12]
    async with databases.database(servers.admin_url, template) as url:
        yield Settings(
            strict_sandbox=True,
            sandbox=True,
            database_url=url,
            order_task_queue=f"orders-{unique}",
            shipping_task_queue=f"shipping-{unique}",
            **{
                "temporal_address": servers.temporal_address,
                "graceful_shutdown_timeout": 5,
                "dispatch_attempts": 2,
                **more,
            },
        )


def seconds(number: float) -> timedelta:
    """For those calls of the SDK that take a `timedelta`."""
    return timedelta(seconds=number)
