"""The database's password in a file: read anew for each connection, so that it changes under running processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr

from app.db.pool import SCHEMA_VERSION, create_pool, migrate, reason
from app.errors import DatabaseUnavailable, SettingsError
from app.sandbox.ledger import Ledger
from app.settings import Settings, load
from tests.test_migrations import Guarded, guarded, superuser  # noqa: F401 - a fixture

URL = "postgresql://trellis_app@db.example.com/trellis?sslmode=disable"


async def test_a_password_changes_without_a_restart(
    guarded: Guarded,  # noqa: F811
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PGPASSWORD")
    file = tmp_path / "password"
    file.write_text("s3cret/@:\n")
    revision = await asyncio.to_thread(migrate, guarded.url(guarded.owner), password_file=file)
    assert revision == SCHEMA_VERSION
    given = settings.model_copy(
        update={"database_url": SecretStr(guarded.url(guarded.app)), "database_password_file": file}
    )
    ledger = Ledger(guarded.url(guarded.app), password_file=file)
    async with create_pool(given) as pool, ledger:
        await ledger.open()
        assert await pool.fetchval("SELECT 1") == 1
        admin = await asyncpg.connect(f"postgresql://postgres@127.0.0.1:{guarded.port}/postgres")
        try:
            await admin.execute(f"ALTER ROLE {guarded.app} PASSWORD 'an other%one'")
            await admin.execute(f"ALTER ROLE {guarded.owner} PASSWORD 'an other%one'")
            ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1"
            await admin.execute(ends, guarded.app)
        finally:
            await admin.close()
        await pool.expire_connections()  # whether they have heard of their end or not
        with pytest.raises(DatabaseUnavailable) as refused:
            await pool.fetchval("SELECT 1")
        assert "InvalidPasswordError" in reason(refused.value)
        file.write_text("an other%one")
        assert await pool.fetchval("SELECT 1") == 1
        await ledger.close()  # a later call opens it again
        assert await ledger.charges_of("nobody") == []
        assert await asyncio.to_thread(migrate, guarded.url(guarded.owner), password_file=file)
        # For a moment there is none, as while it is replaced: "not now", and it is said where.
        file.unlink()
        await pool.expire_connections()
        with pytest.raises(DatabaseUnavailable) as missing:
            await pool.fetchval("SELECT 1")
        assert str(file) in reason(missing.value)


@pytest.mark.parametrize(
    ("content", "url", "said"),
    [
        (None, URL, "cannot be read"),
        ("\n", URL, "is empty"),
        ("one\ntwo", URL, "line break"),
        ("secret", URL.replace("trellis_app@", "trellis_app:hunter2@"), "keep one of them"),
    ],
)
def test_a_file_that_can_not_be_right_is_refused_at_the_start(
    content: str | None, url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_text(content)
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("TRELLIS_DATABASE_URL", url)
    monkeypatch.setenv("TRELLIS_DATABASE_PASSWORD_FILE", str(file))
    with pytest.raises(SettingsError) as refused:
        load()
    assert "TRELLIS_DATABASE_PASSWORD_FILE" in str(refused.value)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "hunter2" not in str(refused.value)
