"""One URL, two drivers: it means the same to both, and a password goes to no server that has not proved who it is."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
import sqlalchemy.exc
from asyncpg.connect_utils import _parse_connect_arguments
from psycopg import pq
from pydantic import SecretStr

from app.db.pool import SCHEMA_VERSION, create_pool, libpq_connection, migrate, schema_version
from app.domain import database_url
from app.domain.database_url import InvalidDatabaseUrl, read
from app.errors import DatabaseUnavailable, SettingsError
from app.settings import Settings, load

SAID = "sslmode=prefer"

# --- read alike ----------------------------------------------------------------------------------------------

#: URLs that libpq documents, for one host or several, however they are written.
URLS = {
    "plain": f"postgresql://user:secret@db.example:5433/shop?{SAID}",
    "other scheme": f"postgres://user@db.example/shop?{SAID}",
    "percent-encoded": f"postgresql://us%40er:p%2F%40%3A%25%23%3F@db.example/sh%20op?{SAID}",
    "raw in the password": f"postgresql://user:a#b?c=d&e@db.example/shop?{SAID}",
    "IPv6": f"postgresql://user:secret@[::1]:5433/shop?{SAID}",
    "IPv6 without a port": f"postgresql://user:secret@[2001:db8::7]/shop?{SAID}",
    "socket in the host": f"postgresql://user:secret@%2Frun%2Fpg:5433/shop?{SAID}",
    "socket as a parameter": f"postgresql://user:secret@/shop?host=/run/pg&port=5433&{SAID}",
    "several hosts": f"postgresql://user:secret@a.example:1,b.example:2/shop?target_session_attrs=read-write&{SAID}",
    "several hosts, one port": f"postgresql://user:secret@a.example,b.example/shop?port=5433&{SAID}",
    "all as parameters": f"postgresql://?host=db.example&port=5433&user=user&password=a%20b%2B&dbname=shop&{SAID}",
    "search path": f"postgresql://user@db.example/shop?options=-csearch_path%3Dshop%2Cpublic&{SAID}",
    "application": f"postgresql://user@db.example/shop?application_name=shop&connect_timeout=5&{SAID}",
    "keepalives": f"postgresql://user@db.example/shop?keepalives_idle=30&tcp_user_timeout=9000&{SAID}",
    "JDBC's TLS": "postgresql://user@db.example/shop?ssl=true",
    "as clouds write it": f"postgresql://user@db.example/shop?channel_binding=prefer&gssencmode=disable&{SAID}",
}


def of_libpq(url: str) -> dict[str, str]:
    """libpq's own reading."""
    return {
        option.keyword.decode(): option.val.decode()
        for option in pq.Conninfo.parse(url.encode())
        if option.val is not None
    }


@pytest.mark.parametrize("url", URLS)
def test_a_url_means_what_libpq_takes_it_for(url: str) -> None:
    meant = of_libpq(URLS[url])
    assert meant.items() <= (read(URLS[url], {}).parameters | {"port": meant.get("port", "")}).items()


@pytest.mark.parametrize("url", URLS)
def test_asyncpg_takes_from_it_what_libpq_does(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By asyncpg's own reading of what it is given, with variables around that would lead it elsewhere."""
    for name in ("PGHOST", "PGHOSTADDR", "PGDATABASE", "PGOPTIONS", "PGSERVICE", "PGPORT"):
        monkeypatch.setenv(name, "1")
    address = read(URLS[url], {})
    addresses, given, _ = _parse_connect_arguments(**(NOTHING | address.for_asyncpg()))
    for found, host, port in zip(addresses, address.hosts, address.parameters["port"].split(","), strict=True):
        assert found == (f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, int(port)))
    wanted = address.parameters
    assert (given.user, given.password, given.database) == (wanted["user"], wanted.get("password"), wanted["dbname"])
    assert given.sslmode.name == wanted["sslmode"].replace("-", "_")
    assert (given.server_settings or {}).get("options") == wanted.get("options")
    assert given.target_session_attrs.value == wanted.get("target_session_attrs", "any")


#: Arguments of asyncpg that a URL does not fill.
NOTHING: dict[str, Any] = {
    **dict.fromkeys(("passfile", "command_timeout", "ssl", "direct_tls", "krbsrvname", "gsslib", "password")),
    **dict.fromkeys(("service", "servicefile")),
    **dict.fromkeys(("statement_cache_size", "max_cached_statement_lifetime", "max_cacheable_statement_size"), 1),
}

REFUSED = {
    "no URL": ("foo", "postgresql://"),
    "key and value": ("host=db.example dbname=shop", "postgresql://"),
    "another library's": ("postgresql+asyncpg://user:s3cret@db.example/shop", "postgresql+asyncpg"),
    "an @ in the password": ("postgresql://user:s3c@ret@db.example/shop", "%40"),
    "a slash in the password": ("postgresql://user:s3c/ret@db.example/shop", "%2F"),
    "a % in the password": ("postgresql://user:s3c%ret@db.example/shop", "%25"),
    "a line break within": ("postgresql://user:s3cret@db.example/\nshop", "line break"),
    "IPv6 without brackets": ("postgresql://user:s3cret@::1:5432/shop", "[IPv6"),
    "a port that is none": ("postgresql://user:s3cret@db.example:http/shop", "port"),
    "ports of other hosts": ("postgresql://user:s3cret@a,b/shop?port=1,2,3", "ports"),
    "unknown parameter": ("postgresql://db.example/shop?search_path=shop", "search_path"),
    "a library's parameter": ("postgresql://db.example/shop?statement_cache_size=0", "statement_cache_size"),
    "parameter of libpq alone": ("postgresql://db.example/shop?service=shop", "service"),
    "unknown mode": ("postgresql://db.example/shop?sslmode=always", "sslmode"),
    "no number": ("postgresql://db.example/shop?connect_timeout=soon", "connect_timeout"),
    "parameter without a value": ("postgresql://db.example/shop?sslmode", "sslmode"),
    "binding that asyncpg lacks": (
        "postgresql://user:s3cret@db.example/shop?sslmode=require&channel_binding=require",
        "channel_binding",
    ),
    "insistence that asyncpg lacks": (
        "postgresql://user:s3cret@db.example/shop?sslmode=disable&require_auth=scram-sha-256",
        "require_auth",
    ),
    "no authority": ("postgresql://db.example/shop?sslmode=verify-full&sslrootcert=/nowhere/ca.pem", "/nowhere/ca.pem"),
    "anybody's certificate": ("postgresql://db.example/shop?sslmode=verify-ca", "sslrootcert"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named_and_no_password_is_shown(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, named = REFUSED[case]
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(InvalidDatabaseUrl) as refused:
        read(url, {})
    assert named in str(refused.value)
    assert "s3c" not in str(refused.value)
    monkeypatch.setenv("TRELLIS_DATABASE_URL", url)
    with pytest.raises(SettingsError, match="TRELLIS_DATABASE_URL: ") as ended:
        load()
    assert "s3c" not in str(ended.value)


def test_a_secret_file_ends_with_a_line_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRELLIS_DATABASE_URL", "postgresql://user@localhost/shop\n")
    monkeypatch.setenv("TRELLIS_TEMPORAL_API_KEY", "key\n")
    settings = load()
    assert read(settings.database_url.get_secret_value()).parameters["dbname"] == "shop"
    assert settings.temporal_api_key == SecretStr("key")


def test_a_wrong_password_in_a_url_is_in_no_error_of_the_settings() -> None:
    with pytest.raises(ValueError, match="database_url") as refused:
        Settings(database_url="postgresql+asyncpg://user:s3cret@db.example/shop")
    assert "s3cret" not in str(refused.value)


# --- the environment -----------------------------------------------------------------------------------------


def test_the_environment_completes_what_the_url_leaves_open() -> None:
    given = read("postgresql://db.example/shop", {"PGUSER": "u", "PGPASSWORD": "p@/", "PGSSLMODE": "prefer"}).parameters
    assert (given["user"], given["password"], given["sslmode"]) == ("u", "p@/", "prefer")
    given = read("postgresql://me:mine@db.example/shop?sslmode=disable", {"PGUSER": "u", "PGPASSWORD": "p"}).parameters
    assert (given["user"], given["password"], given["sslmode"]) == ("me", "mine", "disable")


async def test_no_other_variable_leads_a_driver_elsewhere(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them has: to another machine, into another schema, or into a stack trace."""
    elsewhere = {
        "PGHOST": "192.0.2.1",
        "PGHOSTADDR": "192.0.2.1",
        "PGPORT": "1",
        "PGDATABASE": "elsewhere",
        "PGSERVICE": "elsewhere",
        "PGOPTIONS": "-csearch_path=elsewhere",
        "PGCLIENTENCODING": "nonsense",
        "PGSSLCERTMODE": "require",
        "PGGSSENCMODE": "require",
        "PGTZ": "nonsense",
    }
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    await asyncio.wait_for(asyncio.to_thread(migrate, empty_database_url), 60)
    async with create_pool(Settings(database_url=empty_database_url)) as pool:
        assert await schema_version(pool) == SCHEMA_VERSION


async def test_what_a_url_says_reaches_the_session(database_url: str) -> None:
    """On both drivers; `migrate` by way of its own connection."""
    more = "&" if "?" in database_url else "?"
    said = f"{database_url}{more}options=-csearch_path%3Dshop%2Cpublic&application_name=shop&keepalives_idle=77"
    async with create_pool(Settings(database_url=said)) as pool:
        assert await pool.fetchval("SHOW search_path") == "shop,public"
        assert await pool.fetchval("SHOW application_name") == "shop"
    with libpq_connection(said) as connection:
        shown = [connection.execute(f"SHOW {name}").fetchone() for name in ("search_path", "application_name")]
        assert shown == [("shop,public",), ("shop",)]


# --- who gets the password -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("/run/postgresql", True),
        ("10.0.0.1", False),
        ("db.example", False),
        ("postgres", False),
        ("localhost.example", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_what_is_on_this_machine(host: str, local: bool) -> None:
    assert database_url.is_local(host) is local


@pytest.mark.parametrize(
    ("url", "mode", "auth"),
    [
        ("postgresql://u:p@localhost/d", "prefer", None),
        ("postgresql://u:p@/d?host=/run/pg", "prefer", None),
        ("postgresql://u:p@db.example/d", "verify-full", "scram-sha-256"),
        ("postgresql://u:p@localhost,db.example/d", "verify-full", "scram-sha-256"),
        ("postgresql://u:p@db.example/d?sslmode=require", "require", "scram-sha-256"),
        ("postgresql://u:p@db.example/d?sslmode=disable", "disable", None),
        ("postgresql://u:p@db.example/d?sslmode=verify-full&require_auth=password", "verify-full", "password"),
    ],
)
def test_the_mode_that_goes_without_saying(url: str, mode: str, auth: str | None) -> None:
    address = read(url, {})
    assert (address.parameters["sslmode"], address.parameters.get("require_auth")) == (mode, auth)
    assert f"sslmode={mode}" in address.for_asyncpg()["dsn"]


@dataclass
class Stranger:
    """A server that has no TLS and asks for the password as it is."""

    port: int = 0
    heard: bytearray = field(default_factory=bytearray)


@asynccontextmanager
async def stranger() -> AsyncIterator[Stranger]:
    found = Stranger()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                length = struct.unpack("!I", await reader.readexactly(4))[0]
                message = await reader.readexactly(length - 4)
                if message == struct.pack("!I", 80877103):
                    writer.write(b"N")
                    continue
                writer.write(b"R" + struct.pack("!II", 8, 3))
                found.heard += await reader.read(1000)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()


@pytest.fixture
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 stands for another machine."""
    monkeypatch.setattr(database_url, "is_local", lambda _host: False)


async def by_asyncpg(url: str) -> None:
    async with create_pool(Settings(database_url=url)) as pool:
        await pool.fetchval("SELECT 1")


async def by_libpq(url: str) -> None:
    await asyncio.to_thread(migrate, url)


NO_CONNECTION = (DatabaseUnavailable, sqlalchemy.exc.OperationalError)
DRIVERS: dict[str, Callable[[str], Any]] = {"asyncpg": by_asyncpg, "libpq": by_libpq}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.usefixtures("_elsewhere")
async def test_a_server_without_tls_gets_no_password(driver: str) -> None:
    async with stranger() as server:
        url = f"postgresql://user:s3cret@127.0.0.1:{server.port}/shop"
        with pytest.raises(NO_CONNECTION):
            await DRIVERS[driver](url)
        assert not server.heard
        # Where somebody has said so, it does: the server hears what it is sent.
        with pytest.raises(NO_CONNECTION):
            await asyncio.wait_for(DRIVERS[driver](f"{url}?sslmode=prefer&connect_timeout=2"), 20)
        assert b"s3cret" in server.heard


@pytest.mark.usefixtures("_elsewhere")
async def test_libpq_gives_a_password_by_scram_alone() -> None:
    """Also through TLS; asyncpg cannot insist on that."""
    address = read("postgresql://user:s3cret@127.0.0.1/shop?sslmode=require", {})
    async with stranger() as server:
        given = address.for_libpq() | {"port": str(server.port), "sslmode": "disable"}
        with pytest.raises(psycopg.OperationalError, match="scram-sha-256"):
            await asyncio.to_thread(psycopg.connect, **given)
        assert not server.heard
