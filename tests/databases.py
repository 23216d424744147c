"""Databases for tests: a fresh one, or one for many tests that is emptied in between, as to make one takes longer than
most tests."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import asyncpg

#: With this the product connects as a role of that name, which owns nothing and may create nothing.
ROLE = os.environ.get("TRELLIS_TEST_ROLE")
#: With this it finds databases whose time zone is that one.
TIMEZONE = os.environ.get("TRELLIS_TEST_TIMEZONE")

_OWNERS: dict[str, str] = {}

_GRANTS = """
GRANT USAGE ON SCHEMA public TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role};
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO {role};
CREATE SCHEMA sandbox AUTHORIZATION {role};
"""


@asynccontextmanager
async def database(admin_url: str, template: str = "template1") -> AsyncIterator[str]:
    """The URL of a new database, a copy of `template`; it is dropped at the end."""
    name = f"trellis_test_{uuid.uuid4().hex[:12]}"
    admin = await asyncpg.connect(admin_url)
    try:
        await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        if TIMEZONE:
            await admin.execute(f"ALTER DATABASE \"{name}\" SET timezone = '{TIMEZONE}'")
        owner = urlunsplit(urlsplit(admin_url)._replace(path=f"/{name}"))
        # A database that was not migrated is for the one who migrates.
        url = owner if template == "template1" else _as_the_product(owner)
        _OWNERS[url] = owner
        yield url
        del _OWNERS[url]
        try:
            await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        except asyncpg.InsufficientPrivilegeError:
            # Autovacuum is at work there. Only a superuser may force it out; without force it is asked to leave.
            await admin.execute(f'DROP DATABASE "{name}"')
    finally:
        await admin.close()


def owner_of(url: str) -> str:
    """The URL by which a test does to the product's database what the product may not do."""
    return _OWNERS.get(url, url)


async def as_owner(url: str, *statements: str) -> None:
    """Do to the product's database what the product may not do."""
    connection = await asyncpg.connect(owner_of(url))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def _as_the_product(owner: str) -> str:
    parts = urlsplit(owner)
    return urlunsplit(parts._replace(netloc=f"{ROLE}:{ROLE}@{parts.netloc.rpartition('@')[2]}")) if ROLE else owner


async def prepare_role(admin_url: str) -> None:
    """Make the role of `ROLE`; the one of `admin_url` has to be allowed to."""
    admin = await asyncpg.connect(admin_url)
    try:
        if ROLE and not await admin.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", ROLE):
            await admin.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{ROLE}'")
            await admin.execute(f"GRANT {ROLE} TO CURRENT_USER")
    finally:
        await admin.close()


async def grant(url: str) -> None:
    """Let the role do in a migrated database what the product does, and no more."""
    if ROLE:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(_GRANTS.format(role=ROLE))
        finally:
            await connection.close()


async def empty(url: str) -> None:
    """Take all orders away, also the timeline, which the product cannot do."""
    connection = await asyncpg.connect(owner_of(url))
    try:
        await connection.execute("""
            ALTER TABLE events DISABLE TRIGGER events_are_append_only;
            TRUNCATE orders, payments, events RESTART IDENTITY;
            ALTER TABLE events ENABLE TRIGGER events_are_append_only;
        """)
    finally:
        await connection.close()
