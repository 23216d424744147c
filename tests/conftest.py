"""The real servers, once per run; a database and task queues of its own for each test.

By default the run starts PostgreSQL and the Temporal dev server itself. With TRELLIS_TEST_DATABASE_URL (a role that
may create databases) and TRELLIS_TEST_TEMPORAL_ADDRESS it uses running ones, and touches none of their data.

With TRELLIS_TEST_ROLE the product's role owns nothing, with TRELLIS_TEST_TIMEZONE its databases are of that time zone.
The role of TRELLIS_TEST_DATABASE_URL has to be allowed to make roles for the former.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest

from app.api import create_app
from app.db.pool import create_pool, migrate
from app.local.postgres import USER, LocalPostgres
from app.main import create
from app.services import Services, open_services
from app.settings import Settings
from tests import databases
from tests.support import running_workers, serving, until

# What this machine or container sets for the product is not meant for its tests: the product's metrics port is taken.
for _name in [*os.environ]:
    if _name.startswith(("TRELLIS_", "OTEL_")) and not _name.startswith("TRELLIS_TEST_"):
        del os.environ[_name]
os.environ["TRELLIS_LOG_FORMAT"] = "json"
# A test that wants partners of its own says so.
os.environ["TRELLIS_SANDBOX"] = "true"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The adapters that `tests/test_partner_contract.py` is about."""
    for option, what in (("--gateway", "GatewayCase"), ("--carrier", "CarrierCase")):
        parser.addoption(option, metavar="MODULE:NAME", help=f"context manager of a {what} to run the contract against")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Temporary files of this run go to a directory of its own.

    By default they would go below one that all runs of a user share, and every pytest that starts takes the rights of
    others away from that: PostgreSQL, which does not run as root, then loses its files under a run as root.
    """
    if config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix="trellis-pytest-")
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))


@dataclass(frozen=True)
class Servers:
    """Addresses of the servers this run uses."""

    admin_url: str
    temporal_address: str

    def url(self, database: str) -> str:
        """The URL of another database on the same server."""
        return urlunsplit(urlsplit(self.admin_url)._replace(path=f"/{database}"))


@pytest.fixture(scope="session")
async def servers() -> AsyncIterator[Servers]:
    """PostgreSQL and Temporal."""
    given = os.environ.get("TRELLIS_TEST_DATABASE_URL"), os.environ.get("TRELLIS_TEST_TEMPORAL_ADDRESS")
    async with AsyncExitStack() as stack:
        if not all(given):
            # The wheels with the servers are not needed where servers are given, as in the container.
            from app.local.stack import LocalStack

            local = await stack.enter_async_context(LocalStack(durable=False))
            if databases.ROLE:
                await let_it_make_roles(local.postgres)
            given = local.database_url, local.temporal_address
        database_url, temporal_address = given
        assert database_url
        assert temporal_address
        await databases.prepare_role(database_url)
        yield Servers(database_url, temporal_address)


async def let_it_make_roles(server: LocalPostgres) -> None:
    """The role of our own server may not, and nobody else can log in: so the superuser may, for as long as this run."""
    (server.data / "pg_hba.conf").write_text(
        "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
    )
    os.kill(int((server.data / "postmaster.pid").read_text().split()[0]), signal.SIGHUP)

    async def allowed() -> bool:
        try:
            admin = await asyncpg.connect(f"postgresql://postgres@127.0.0.1:{server.port}/postgres")
        except asyncpg.PostgresError:
            return False
        await admin.execute(f"ALTER ROLE {USER} CREATEROLE")
        await admin.close()
        return True

    await until(allowed, "the server to trust its superuser")


@pytest.fixture(scope="session")
async def template(servers: Servers) -> AsyncIterator[str]:
    """The name of a migrated database, to be copied."""
    async with databases.database(servers.admin_url) as url:
        await asyncio.to_thread(migrate, url)
        await databases.grant(url)
        yield urlsplit(url).path.removeprefix("/")


@pytest.fixture
async def database_url(servers: Servers, template: str) -> AsyncIterator[str]:
    """A fresh, migrated database."""
    async with databases.database(servers.admin_url, template) as url:
        yield url


@pytest.fixture
async def empty_database_url(servers: Servers) -> AsyncIterator[str]:
    """A fresh database without a schema."""
    async with databases.database(servers.admin_url) as url:
        yield url


@pytest.fixture(scope="module")
async def shared_database(servers: Servers, template: str) -> AsyncIterator[str]:
    """One migrated database for a module's tests, which empty it in between."""
    async with databases.database(servers.admin_url, template) as url:
        yield url


@pytest.fixture
def settings(servers: Servers, database_url: str) -> Settings:
    """Settings of this test alone: its database and its task queues on the shared Temporal."""
    unique = uuid.uuid4().hex[:8]
    return Settings(
        strict_sandbox=True,
        sandbox=True,
        database_url=database_url,
        temporal_address=servers.temporal_address,
        order_task_queue=f"orders-{unique}",
        shipping_task_queue=f"shipping-{unique}",
        graceful_shutdown_timeout=5,
        dispatch_attempts=3,
        # Tests share a machine that is busy; what is to be answered soon has its own limit.
        database_acquire_timeout=10,
    )


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[asyncpg.Pool]:
    """Connections to the test's database."""
    async with create_pool(settings) as opened:
        yield opened


@pytest.fixture
async def services(settings: Settings) -> AsyncIterator[Services]:
    """Everything a process of the product is built from."""
    async with open_services(settings) as opened:
        yield opened


@pytest.fixture
async def workers(services: Services) -> AsyncIterator[Services]:
    """Both workers, on the test's task queues."""
    async with running_workers(services):
        yield services


@pytest.fixture
async def api_url(settings: Settings) -> AsyncIterator[str]:
    """The product as `uvicorn app.main:app` runs it - API and both workers - on a real port."""
    async with serving(create(settings)) as url:
        yield url


@pytest.fixture
async def api(api_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the product."""
    async with httpx.AsyncClient(base_url=api_url, timeout=30) as client:
        yield client


@pytest.fixture
async def api_alone(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the API without any worker."""
    async with serving(create_app(settings)) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        yield client
