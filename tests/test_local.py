"""The servers of `trellis run`: real ones, on free ports, in directories of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
import typer
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client
from typer.testing import CliRunner

from app.cli.run import Options, run
from app.local import privileges
from app.local.postgres import DataUnusable, LocalPostgres, StopMode
from app.local.privileges import Capability
from app.local.process import (
    Launch,
    LocalError,
    NotReady,
    PortTaken,
    ServerDied,
    ServerProcess,
    check_port,
    command_line,
    free_port,
    run_tool,
    until,
)
from app.local.stack import DataInUse, LocalStack, UsualPorts
from app.local.temporal import LocalTemporal
from app.settings import Settings

ROOT = Path(__file__).parent.parent
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalPostgres]:
    """A server for all tests that do nothing to its files: making those takes longer than any test."""
    folder = tmp_path_factory.mktemp("cluster")
    server = LocalPostgres(folder / "postgres", log=folder / "postgres.log", durable=False)
    await server.start()
    await server.ensure_database("trellis")
    yield server
    await server.stop("kill")


@pytest.fixture
async def postgres(cluster: LocalPostgres) -> LocalPostgres:
    """That server, running."""
    if not cluster.process.running:
        await cluster.start()
    return cluster


@pytest.fixture
def taken() -> Iterator[int]:
    """A port where somebody listens."""
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        yield somebody.getsockname()[1]


async def query(server: LocalPostgres, sql: str, database: str = "trellis") -> object:
    connection = await asyncpg.connect(server.url(database))
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


def launch(
    *command: object, stdin: int | None = None, stdout: int | IO[bytes] = subprocess.PIPE, umask: int = -1
) -> subprocess.Popen[bytes]:
    arguments = [str(part) for part in command]
    return subprocess.Popen(arguments, stdin=stdin, stdout=stdout, stderr=subprocess.STDOUT, cwd=ROOT, umask=umask)


def alive(pid: int) -> bool:
    return command_line(pid) not in ([], [""])


RUN_A_STACK = """
import asyncio, pathlib, sys
from app.local.stack import LocalStack
async def main():
    async with LocalStack(pathlib.Path(sys.argv[1]), durable=False) as stack:
        print("pids", stack.postgres.process.pid, stack.temporal.process.pid, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
asyncio.run(main())
"""


# --- both servers --------------------------------------------------------------------------------------------


async def test_stack_serves_and_leaves_nothing_behind() -> None:
    lines: list[str] = []
    async with LocalStack(durable=False, ui_port=0, namespaces=["other"], report=lines.append) as stack:
        settings = Settings(**stack.settings_overrides())
        assert settings.database_url.get_secret_value() == stack.env()["TRELLIS_DATABASE_URL"]
        assert await query(stack.postgres, "SELECT current_user") == "trellis"
        client = await Client.connect(stack.env()["TRELLIS_TEMPORAL_ADDRESS"])
        for namespace in ("default", "other"):
            await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=namespace))
        async with httpx.AsyncClient() as web:
            assert (await web.get(f"http://127.0.0.1:{stack.temporal.ui_port}/")).status_code == 200
            metrics = await web.get(f"http://127.0.0.1:{stack.temporal.metrics_port}/metrics")
            assert "service_requests" in metrics.text
        pids = [stack.postgres.process.pid, stack.temporal.process.pid]
        assert all(pid is not None and os.getsid(pid) == pid for pid in pids), "a session of its own each"

    assert not any(alive(pid) for pid in pids if pid is not None)
    assert not stack.data.exists()
    assert any(line.startswith("PostgreSQL ready in ") for line in lines)


async def test_data_survive_a_restart_and_belong_to_one_run_at_a_time(tmp_path: Path) -> None:
    async with LocalStack(tmp_path / "data", durable=False) as first:
        await query(first.postgres, "CREATE TABLE kept AS SELECT 7 AS number")
        with pytest.raises(DataInUse, match=str(os.getpid())):
            await LocalStack(tmp_path / "data").start()
        assert await query(first.postgres, "SELECT number FROM kept") == 7, "untouched by the second"

    async with LocalStack(tmp_path / "data", durable=False) as second:
        assert await query(second.postgres, "SELECT number FROM kept") == 7


async def test_watch_tells_which_server_died(tmp_path: Path) -> None:
    async with LocalStack(tmp_path / "data", durable=False) as stack:
        watch = asyncio.create_task(stack.watch())
        assert stack.temporal.process.pid is not None
        os.kill(stack.temporal.process.pid, signal.SIGKILL)
        with pytest.raises(ServerDied, match=r"Temporal was ended by signal 9; the end of .*temporal\.log:\n  "):
            await asyncio.wait_for(watch, 5)


@ON_LINUX
async def test_servers_end_with_a_killed_run_and_the_next_run_finds_the_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    first = launch(sys.executable, "-c", RUN_A_STACK, data, stdin=subprocess.PIPE)
    assert first.stdout is not None
    with first:
        line = (await asyncio.to_thread(first.stdout.readline)).decode()
        if not line.startswith("pids "):
            pytest.fail(line + first.stdout.read().decode())
        first.kill()
    pids = [int(pid) for pid in line.split()[1:]]
    async with LocalStack(data, durable=False) as stack:  # without waiting: they may still be on their way out
        assert await query(stack.postgres, "SELECT 1") == 1
        assert not any(alive(pid) for pid in pids)


# --- PostgreSQL ----------------------------------------------------------------------------------------------


async def test_role_of_the_product_is_no_superuser(postgres: LocalPostgres) -> None:
    assert await query(postgres, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await asyncpg.connect(f"postgresql://postgres@127.0.0.1:{postgres.port}/postgres")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(f"postgresql://trellis:wrong@127.0.0.1:{postgres.port}/postgres")


async def test_durable_unless_told_otherwise(postgres: LocalPostgres, tmp_path: Path) -> None:
    assert await query(postgres, "SHOW fsync") == "off"
    await postgres.stop()
    durable = LocalPostgres(postgres.data, log=postgres.log)
    await durable.start()
    try:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert await query(durable, f"SHOW {setting}") == "on"
    finally:
        await durable.stop()


async def test_ensure_database_is_repeatable_and_quotes(postgres: LocalPostgres) -> None:
    for _ in range(2):
        await postgres.ensure_database('odd "name"')
    assert await query(postgres, "SELECT count(*) FROM pg_database WHERE datname = 'odd \"name\"'") == 1


@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
async def test_restart_after_every_kind_of_stop(postgres: LocalPostgres, mode: StopMode) -> None:
    await query(postgres, f"CREATE TABLE kept_{mode} AS SELECT 7 AS number")
    port = postgres.port
    await postgres.stop(mode)
    await postgres.start()
    assert postgres.port == port
    assert await query(postgres, f"SELECT number FROM kept_{mode}") == 7


async def test_leftover_postmaster_on_the_same_data_is_stopped(postgres: LocalPostgres) -> None:
    old = postgres.process.pid
    assert old is not None
    # As a new run sees it: it knows the directory and the port, not the process.
    again = LocalPostgres(postgres.data, postgres.port, log=postgres.log, durable=False)
    await again.start()
    assert not alive(old)
    assert await query(again, "SELECT 1") == 1
    await again.stop()


async def test_process_that_inherited_the_number_is_left_alone(postgres: LocalPostgres) -> None:
    await postgres.stop("kill")
    stranger = launch("sleep", "60")
    try:
        pid_file = postgres.data / "postmaster.pid"
        _, _, rest = pid_file.read_text().partition("\n")
        pid_file.write_text(f"{stranger.pid}\n{rest}")
        await postgres.start()
        assert stranger.poll() is None
        assert await query(postgres, "SELECT 1") == 1
    finally:
        stranger.kill()
        stranger.wait()


async def test_data_of_another_version_or_purpose_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    data.mkdir()
    server = LocalPostgres(data, log=tmp_path / "log")
    (data / "precious").touch()
    with pytest.raises(DataUnusable, match=rf"{data} is not empty"):
        await server.start()
    (data / "PG_VERSION").write_text("9\n")
    with pytest.raises(DataUnusable, match=rf"{data} was made by PostgreSQL 9, .* --data"):
        await server.start()
    assert (data / "precious").exists()


async def test_early_death_shows_what_the_server_said(postgres: LocalPostgres) -> None:
    await postgres.stop()
    config = postgres.data / "postgresql.conf"
    good = config.read_text()
    config.write_text(f"{good}\nno_such_setting = 1\n")
    with pytest.raises(ServerDied, match=r"PostgreSQL exited with code 1; .*\n(.*\n)*.*no_such_setting"):
        await postgres.start()
    config.write_text(good)


# --- Temporal ------------------------------------------------------------------------------------------------


async def test_leftover_temporal_on_the_same_data_is_stopped(tmp_path: Path) -> None:
    old = LocalTemporal(tmp_path, log=tmp_path / "log", dynamic_config={"frontend.rps": 1000})
    await old.start()
    pid = old.process.pid
    again = LocalTemporal(tmp_path, old.port, log=tmp_path / "log")
    try:
        await again.start()
        assert pid is not None
        assert not alive(pid)
    finally:
        await again.stop()
        await old.kill()
    assert not (tmp_path / "temporal.pid").exists()


# --- ports and processes -------------------------------------------------------------------------------------


def test_taken_port_names_the_option(taken: int) -> None:
    with pytest.raises(PortTaken, match=rf"{taken}, for the API; .*--port"):
        check_port(taken, "the API", "--port")
    assert free_port() != taken


def test_run_names_every_taken_port_before_it_starts_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(run)
    with contextlib.ExitStack() as listeners:
        ports = {}
        for name in ("--port", "--postgres-port", "--temporal-port", "--ui-port", "TRELLIS_METRICS_PORT"):
            listener = listeners.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports[name] = str(listener.getsockname()[1])
        monkeypatch.setenv("TRELLIS_METRICS_PORT", ports["TRELLIS_METRICS_PORT"])
        arguments = [part for name, port in ports.items() if name.startswith("--") for part in (name, port)]
        result = CliRunner().invoke(app, ["--data", str(tmp_path / "data"), *arguments])
    assert result.exit_code == 1
    for name, port in ports.items():
        assert re.search(rf"\b{port}, for [^.]*{name}", result.output), result.output
    assert "Traceback" not in result.output
    assert {path.name for path in (tmp_path / "data").iterdir()} <= {"lock"}, "nothing was started"


async def test_what_nobody_asked_for_takes_the_usual_port_or_a_free_one(taken: int, tmp_path: Path) -> None:
    usual = UsualPorts(postgres=taken, temporal=free_port_again(), ui=taken)
    stack = LocalStack(tmp_path / "data", ui_port=0, usual=usual)
    await stack.prepare()
    await stack.stop()
    found = (stack.postgres.port, stack.temporal.port, stack.temporal.ui_port, stack.temporal.metrics_port)
    assert found[1] == usual.temporal
    assert taken not in found
    assert 0 not in found
    assert len(set(found)) == 4


def free_port_again() -> int:
    """A free port that `free_port` has not given to anybody."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_the_usual_ports_are_left_to_whoever_asked_for_them() -> None:
    options = Options(data=None, host="127.0.0.1", port=5432, temporal_port=8233)
    assert options.usual_ports == UsualPorts(postgres=0, temporal=7233, ui=0)


async def test_process_that_ends_early_or_never_answers(tmp_path: Path) -> None:
    async def never() -> bool:
        return False

    early = ServerProcess("Early", Launch([sys.executable, "-c", "print('the reason'); exit(3)"], tmp_path / "log"))
    early.spawn()
    with pytest.raises(ServerDied, match=r"Early exited with code 3; the end of .*log:\n  the reason"):
        await early.ready(never)

    silent = ServerProcess("Silent", Launch(["sleep", "60"], tmp_path / "silent.log"))
    silent.spawn()
    with pytest.raises(NotReady, match="Silent, after 0 s"):
        await silent.ready(never, timeout=0.2)
    await silent.stop([(signal.SIGTERM, 5)])
    assert not silent.running

    with pytest.raises(LocalError, match="Missing cannot be started"):
        ServerProcess("Missing", Launch([str(tmp_path / "missing")], tmp_path / "log")).spawn()


async def test_stop_escalates_and_can_be_hurried(tmp_path: Path) -> None:
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    deaf = ServerProcess("Deaf", Launch([sys.executable, "-c", program], tmp_path / "log"))
    deaf.spawn()
    assert await until(lambda: "deaf" in deaf.tail(), 10)
    started = time.monotonic()
    stopping = asyncio.create_task(deaf.stop([(signal.SIGTERM, 60)]))
    await asyncio.sleep(0.2)
    deaf.hurry()
    await asyncio.wait_for(stopping, 5)
    assert not deaf.running
    assert time.monotonic() - started < 3


def modes(*paths: Path) -> dict[Path, int]:
    """Modes of these and of every directory above."""
    return {path: stat.S_IMODE(path.stat().st_mode) for each in paths for path in (each, *each.resolve().parents)}


@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed"])
async def test_nothing_outside_the_data_directory_is_changed_and_nothing_inside_is_for_others(
    tmp_path: Path, killed: bool
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    data = home / "work" / ".trellis"
    data.mkdir(parents=True)
    data.chmod(0o755)
    (data / "temporal.log").touch(0o644)  # as an earlier release left it
    program = LocalPostgres(data, log=data / "log")._bin / "postgres"
    before = modes(home / "work", program)
    running = launch(sys.executable, "-c", RUN_A_STACK, data, stdin=subprocess.PIPE, umask=0)
    with running:
        assert running.stdin
        assert running.stdout
        line = await asyncio.to_thread(running.stdout.readline)
        assert line.startswith(b"pids "), line + running.stdout.read()
        during = modes(home / "work", program)
        kept = {path: stat.S_IMODE(path.stat().st_mode) for path in (data, *data.rglob("*"))}
        if killed:
            running.kill()
        else:
            running.communicate(b"\n")
    assert before == during == modes(home / "work", program)
    assert {path.name for path in kept} >= {"lock", "temporal.db", "temporal.log", "postgres.log", "temporal.pid"}
    assert [path for path, mode in kept.items() if mode & 0o077] == []
    assert kept[data] == 0o700


async def test_a_directory_with_other_things_in_it_stays_as_open_as_it_is(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    (shared / "readme").touch(0o644)
    (shared / "postgres.log").symlink_to(shared / "readme")
    stack = LocalStack(shared)
    await stack.prepare()
    await stack.stop()
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (shared, *shared.iterdir())}
    assert found == {"shared": 0o755, "readme": 0o644, "postgres.log": 0o644, "lock": 0o600}


def test_an_account_gets_the_smallest_right_that_leads_to_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, data = tmp_path / "bin" / "program", tmp_path / "data"
    program.parent.mkdir()
    program.touch(0o755)
    data.mkdir(mode=0o700)
    stranger = privileges.Account("stranger", 54321, 54321)
    everything = set(Capability)

    def needed(*, having: set[Capability]) -> Capability | None:
        monkeypatch.setattr(privileges, "_permitted", lambda: sum(1 << capability for capability in having))
        return privileges.capability_for(stranger, program, data / "postgres")

    assert needed(having=everything) is Capability.DAC_READ_SEARCH
    assert needed(having=everything - {Capability.DAC_READ_SEARCH}) is Capability.DAC_OVERRIDE
    for too_few in ({Capability.SETPCAP}, everything - {Capability.SETPCAP}):
        with pytest.raises(LookupError, match=f"user stranger cannot enter {tmp_path}"):
            needed(having=too_few)
    program.chmod(0o700)
    assert needed(having=everything) is Capability.DAC_OVERRIDE
    mine = privileges.Account("me", os.geteuid(), os.getegid())
    monkeypatch.setattr(privileges, "_may", lambda *_: True)
    assert privileges.capability_for(mine, program, data) is None


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root gives rights to others")
async def test_another_user_sees_programs_below_a_closed_directory(tmp_path: Path) -> None:
    """As initdb does, which looks for `postgres` with access(2)."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    program = closed / "program"
    program.touch(0o755)
    account = privileges.account_for(tmp_path)
    assert account
    looks = "import os, sys; sys.exit(not os.access(sys.argv[1], os.R_OK | os.X_OK))"
    capability = privileges.capability_for(account, program, tmp_path)
    launch = Launch(
        args=[sys.executable, "-c", looks, str(program)],
        log=tmp_path / "log",
        cwd=Path("/"),
        account=account,
        capability=capability,
    )
    await run_tool("looks", launch)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root gives rights to others")
def test_the_server_of_another_user_has_one_right(postgres: LocalPostgres) -> None:
    status = Path(f"/proc/{postgres.process.pid}/status").read_text()
    rights = {int(found, 16) for found in re.findall(r"^Cap(?:Prm|Eff|Inh|Amb):\s+(\w+)$", status, re.MULTILINE)}
    assert rights <= {0, 1 << Capability.DAC_READ_SEARCH, 1 << Capability.DAC_OVERRIDE}
    assert len(rights) == 1
    assert not re.search(r"^Uid:.*\b0\b", status, re.MULTILINE)


# --- the command ---------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
async def test_run_until_terminated(tmp_path: Path) -> None:
    port, output = free_port(), tmp_path / "output"
    with output.open("wb") as log:
        arguments = ["--data", tmp_path / "data", "--port", port]
        process = launch(sys.executable, "-m", "app", "run", *arguments, stdout=log)
    try:
        curl = f"curl -X POST http://127.0.0.1:{port}/orders/o-1/signals/approve\n"
        assert await until(lambda: curl in output.read_text(), 180), output.read_text()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as web:
            assert (await web.get("/readyz")).status_code == 200
        # What was printed is where it is, whatever else listens at the usual ports of this machine.
        environment = tmp_path / "data" / "env"
        assert f". {environment}" in output.read_text()
        addresses = dict(re.findall(r"^export (\w+)=(.*)$", environment.read_text(), re.MULTILINE))
        assert addresses["TRELLIS_URL"] == f"http://127.0.0.1:{port}"
        assert addresses["TRELLIS_DATABASE_URL"] in output.read_text()
        audit = launch("sh", "-c", f". {environment} && exec {sys.executable} -m app audit")
        told, _ = await asyncio.to_thread(audit.communicate)
        assert audit.returncode == 0, told
        assert b"0 violations" in told
        process.terminate()
        assert await asyncio.to_thread(process.wait, 60) == 0, output.read_text()
    finally:
        process.kill()
        process.wait()
    assert "Everything is stopped." in output.read_text()
    assert "Traceback" not in output.read_text()
    for address in (addresses["TRELLIS_DATABASE_URL"], "//" + addresses["TEMPORAL_ADDRESS"]):
        check_port(urlsplit(address).port or 0, "the next run", "--port")
    check_port(port, "the next run", "--port")
