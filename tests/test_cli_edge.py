"""How commands end when a server is not there, refuses, or was set up wrongly: one line, exit code 4, no stack."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import structlog

from app import settings as settings_module
from app.cli import edge, healthcheck
from app.cli.main import run_command
from app.local.process import free_port
from app.settings import misspelt
from tests.conftest import Servers

UNAVAILABLE = 4


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """A command listens for SIGTERM, remembers what it has warned of, and sends the log to standard error, which is
    another one afterwards. None has set up logging for the next."""
    handler = signal.getsignal(signal.SIGTERM)
    root = logging.getLogger()
    handlers, level, source = root.handlers[:], root.level, logging._srcfile
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
    root.handlers[:], logging._srcfile = handlers, source
    root.setLevel(level)
    signal.signal(signal.SIGTERM, handler)
    settings_module._warn.cache_clear()


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    err: str


class Trellis:
    """Commands, in this process: a process for each would take longer than all else here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str, **environment: str) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["trellis", *arguments])
        for name, value in environment.items():
            self._monkeypatch.setenv(name, value)
        code = run_command()
        return Ended(code, self._capsys.readouterr().err)


@pytest.fixture
def trellis(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Trellis:
    return Trellis(monkeypatch, capsys)


def one_line(ended: Ended, *said: str) -> None:
    assert ended.code == UNAVAILABLE, ended
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("trellis: "), ended.err
    assert "Traceback" not in ended.err
    for words in said:
        assert words in ended.err, ended.err


#: Those that ask the servers something and end.
ASKING = {
    "audit": ("audit",),
    "audit without Temporal": ("audit", "--no-temporal"),
    "reconcile": ("reconcile",),
    "reconcile --apply": ("reconcile", "--apply"),
    "migrate": ("migrate",),
    "migrate --no-wait": ("migrate", "--no-wait"),
    "run-all": ("run-all", "--port", "1"),
}
OF_TEMPORAL = {
    "reconcile": ("reconcile", "--grace", "0"),
    "reconcile --every": ("reconcile", "--every", "60"),
    "reconcile --every 0": ("reconcile", "--every", "0"),
    "deployment show": ("deployment", "show", "--name", "d"),
    "deployment promote": ("deployment", "promote", "--name", "d", "--build-id", "b", "--timeout", "1"),
}
ALL = {
    **ASKING,
    **OF_TEMPORAL,
    "api": ("api",),
    "worker": ("worker", "default"),
    "sandbox": ("sandbox",),
    "run": ("run", "--ephemeral"),
}


@pytest.mark.parametrize("command", ALL)
def test_a_database_url_that_is_none_ends_every_command(trellis: Trellis, command: str) -> None:
    one_line(trellis(*ALL[command], TRELLIS_DATABASE_URL="foo"), "TRELLIS_DATABASE_URL", "postgresql://")


@pytest.mark.parametrize("command", ASKING)
def test_a_wrong_password_is_one_line(trellis: Trellis, database_url: str, command: str) -> None:
    wrong = database_url.replace(":trellis@", ":wrong@")
    assert wrong != database_url
    ended = trellis(*ASKING[command], TRELLIS_DATABASE_URL=wrong)
    one_line(ended, "PostgreSQL at TRELLIS_DATABASE_URL", "password authentication failed")
    assert "wrong" not in ended.err


@pytest.mark.parametrize("command", [name for name in ASKING if name not in {"migrate", "run-all"}])
def test_no_database_is_one_line(trellis: Trellis, command: str) -> None:
    """`migrate` and `run-all` wait for it."""
    nowhere = f"postgresql://trellis:trellis@127.0.0.1:{free_port()}/trellis"
    one_line(trellis(*ASKING[command], TRELLIS_DATABASE_URL=nowhere), "PostgreSQL at TRELLIS_DATABASE_URL")


@pytest.mark.parametrize("command", OF_TEMPORAL)
def test_no_temporal_is_one_line(trellis: Trellis, database_url: str, command: str) -> None:
    ended = trellis(
        *OF_TEMPORAL[command],
        TRELLIS_DATABASE_URL=database_url,
        TRELLIS_TEMPORAL_ADDRESS=f"127.0.0.1:{free_port()}",
        TRELLIS_TEMPORAL_RPC_TIMEOUT="0.5",
    )
    lines = ended.err.splitlines(keepends=True)
    # `promote` says what it waits for.
    one_line(Ended(ended.code, lines[-1]), "connect")
    assert all(line.startswith("waiting: ") for line in lines[:-1])


def test_a_role_that_may_not_migrate_is_one_line(trellis: Trellis, servers: Servers) -> None:
    missing = servers.url("no_such_database")
    one_line(trellis("migrate", "--no-wait", TRELLIS_DATABASE_URL=missing), "no_such_database")


def test_errors_are_json_where_answers_are(trellis: Trellis) -> None:
    ended = trellis("audit", "--json", TRELLIS_DATABASE_URL="foo")
    error = json.loads(ended.err)
    assert error.keys() == {"error", "exit_code"}
    assert error["exit_code"] == ended.code == UNAVAILABLE
    assert "TRELLIS_DATABASE_URL" in error["error"]
    ended = trellis("order", "status", "o-1", "--json", "--url", f"http://127.0.0.1:{free_port()}")
    assert json.loads(ended.err)["exit_code"] == ended.code == UNAVAILABLE


def test_a_defect_is_no_result(monkeypatch: pytest.MonkeyPatch, trellis: Trellis) -> None:
    """Exit code 1 of `audit` means that money is wrong."""

    def broken(_arguments: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr("app.cli.main.app", lambda: broken(None))
    ended = trellis("audit")
    assert ended.code == 70
    assert ended.err.startswith("trellis: unexpected KeyError")
    assert ended.err.count("\n") == 1
    assert "secret" not in ended.err
    ended = trellis("audit", TRELLIS_LOG_LEVEL="debug")
    assert "Traceback" in ended.err


WRONG = {
    "TRELLIS_TEMPORAL_ADDRESS": "temporal.example",
    "TRELLIS_TEMPORAL_TLS_CA": "/nowhere/ca.pem",
    "TRELLIS_METRICS_PORT": "many",
    "TRELLIS_DATABASE_POOL_SIZE": "0",
    # What Python takes for a number, and people do not.
    "TRELLIS_MAX_STREAMS": "1_000",
    "TRELLIS_UPDATE_TIMEOUT": "inf",
    "TRELLIS_DEMO_PRICE": "\u0661\u0662",
}


@pytest.mark.parametrize("variable", WRONG)
def test_a_wrong_setting_is_named(trellis: Trellis, variable: str) -> None:
    one_line(trellis("api", **{variable: WRONG[variable]}), variable)


@pytest.mark.parametrize("command", ["api", "sandbox"])
def test_a_taken_port_is_not_an_order_that_refuses(trellis: Trellis, command: str) -> None:
    """uvicorn's own code for it is 3, which is ours for orders."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = trellis(command, "--port", str(taken.getsockname()[1]), TRELLIS_API_HOST="127.0.0.1")
    assert (ended.code, "Traceback" in ended.err) == (UNAVAILABLE, False)


async def test_uvicorn_ends_likewise() -> None:
    """The published line, which does not go through our commands."""
    cases = {"TRELLIS_DATABASE_URL": "foo", "OTEL_PROPAGATORS": "b3"}
    ends = await asyncio.gather(*(_uvicorn({name: value}) for name, value in cases.items()))
    for name, ended in zip(cases, ends, strict=True):
        one_line(ended, name.partition("_")[0])


async def _uvicorn(environment: dict[str, str]) -> Ended:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0"),
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, err = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
    return Ended(process.returncode or 0, err.decode())


def test_a_wrong_port_is_no_stack_of_the_health_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRELLIS_METRICS_PORT", "many")
    assert healthcheck.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# --- variables that are nearly ours ---------------------------------------------------------------------------


def test_a_misspelt_variable_is_a_warning(trellis: Trellis) -> None:
    ended = trellis("audit", TRELLIS_DATABSE_URL="postgresql://db/trellis", TRELLIS_LOG_FORMAT="odd")
    warning, error = ended.err.splitlines()
    assert warning == "trellis: warning: TRELLIS_DATABSE_URL is not a setting; did you mean TRELLIS_DATABASE_URL?"
    assert "TRELLIS_LOG_FORMAT" in error


def test_what_kubernetes_and_the_tests_set_is_no_misspelling() -> None:
    fine = (
        *("TRELLIS_DATABASE_URL", "TRELLIS_URL", "TRELLIS_TEST_DATABASE_URL", "TRELLIS_API_SERVICE_HOST"),
        *("TRELLIS_API_PORT_8000_TCP_ADDR", "TRELLIS_POSTGRESQL_SERVICE_PORT_POSTGRESQL", "TRELLIS_POSTGRESQL_PORT"),
    )
    assert misspelt(dict.fromkeys(fine, "x")) == []
    assert misspelt({"TRELLIS_QQQQQQQQQQQ": "x"}) == ["TRELLIS_QQQQQQQQQQQ is not a setting"]


def test_telemetry_that_is_set_up_wrongly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.sdk.trace import SpanLimits

    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")
    with pytest.raises(ValueError, match="many") as wrong:
        SpanLimits()
    end = edge.end_of(wrong.value)
    assert end.code == UNAVAILABLE
    assert "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT" in end.message


# --- the environment of the shell -----------------------------------------------------------------------------

#: What a shell may hold that was meant for other servers.
SHELL = {
    "ALL_PROXY": "socks5://127.0.0.1:1",
    "HTTP_PROXY": "http://127.0.0.1:1",
    "HTTPS_PROXY": "not a proxy",
    "SSL_CERT_FILE": "/nowhere/ca.pem",
}


@pytest.mark.parametrize("variable", SHELL)
def test_no_variable_keeps_a_command_from_this_machine(trellis: Trellis, variable: str) -> None:
    """With no API there, it says that; with one, it would reach it."""
    url = f"http://127.0.0.1:{free_port()}"
    one_line(trellis("order", "status", "o-1", "--url", url, **{variable: SHELL[variable]}), f"no API at {url}")


@pytest.mark.parametrize("variable", ["ALL_PROXY", "SSL_CERT_FILE"])
def test_a_variable_that_counts_and_is_wrong_is_named(trellis: Trellis, variable: str) -> None:
    one_line(trellis("order", "status", "o-1", "--url", "https://192.0.2.1", **{variable: SHELL[variable]}), variable)
