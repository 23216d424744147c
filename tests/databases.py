"""Databases for tests: a fresh one, or one for many tests that is emptied in between, as to make one takes longer than
most tests."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import asyncpg


@asynccontextmanager
async def database(admin_url: str, template: str = "template1") -> AsyncIterator[str]:
    """The URL of a new database, a copy of `template`; it is dropped at the end."""
    name = f"trellis_test_{uuid.uuid4().hex[:12]}"
    admin = await asyncpg.connect(admin_url)
    try:
        await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        yield urlunsplit(urlsplit(admin_url)._replace(path=f"/{name}"))
        try:
            await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        except asyncpg.InsufficientPrivilegeError:
            # Autovacuum is at work there. Only a superuser may force it out; without force it is asked to leave.
            await admin.execute(f'DROP DATABASE "{name}"')
    finally:
        await admin.close()


async def empty(url: str) -> None:
    """Take all orders away, also the timeline, which the product cannot do."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("""
            ALTER TABLE events DISABLE TRIGGER events_are_append_only;
            TRUNCATE orders, payments, events RESTART IDENTITY;
            ALTER TABLE events ENABLE TRIGGER events_are_append_only;
        """)
    finally:
        await connection.close()
