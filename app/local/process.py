"""Child processes that live exactly as long as the command that started them.

A child gets a session of its own, so that Ctrl-C in the terminal reaches only us and we decide the order in which
things stop; on Linux the kernel ends it even when we are killed and can decide nothing any more.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.errors import TrellisError
from app.local.privileges import Account, Capability, keep_capabilities, reduction_to

_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

POLL = 0.05
"""Seconds between two looks at a process."""

PROBE_TIMEOUT = 5.0
"""Seconds after which one readiness probe counts as a no."""

HURRIED_GRACE = 1.0
"""Seconds a signal is given once somebody is in a hurry."""

LOG_KEPT = 5 * 1024 * 1024
"""Bytes a log may have at a start before it is put aside as `<name>.old`."""

PRIVATE_UMASK = 0o077
"""Of what is started here: its files are for the one who runs it."""

PR_SET_PDEATHSIG = 1


class LocalError(TrellisError):
    """The local servers cannot run"""


class PortTaken(LocalError):
    """The port is taken"""


class ServerDied(LocalError):
    """A server ended by itself"""


class NotReady(LocalError):
    """A server did not become ready"""


class CannotStop(LocalError):
    """A process left over from an earlier run does not end"""


Stage = tuple[signal.Signals, float]
"""A signal, and the seconds its receiver is given before the next one."""

Probe = Callable[[], Awaitable[bool]]

Report = Callable[[str], None]
"""Is told what happens, one line at a time."""


def silent(_: str) -> None:
    """The `Report` that nobody reads."""


@dataclass(frozen=True)
class Launch:
    """How a child is started."""

    args: Sequence[str]
    log: Path
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    account: Account | None = None
    """Who the child runs as; None: whoever we are."""
    capability: Capability | None = None
    """What the account is given of root's rights, so that it reaches its files."""
    stdin: str = ""
    if_orphaned: signal.Signals = signal.SIGTERM
    """What the kernel sends to the child when we die (Linux)."""


class ServerProcess:
    """One child process, its log and its end.

    `subprocess` and polling, not asyncio's own subprocesses: a server may outlive the event loop that started it
    (a test session has several), and no thread or child watcher has to be kept alive for it.
    """

    def __init__(self, name: str, launch: Launch) -> None:
        self.name = name
        self.log = launch.log
        self._launch = launch
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._hurry = False

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def spawn(self) -> None:
        """Start the process.

        Raises:
            LocalError: the program or its log cannot be opened.
        """
        try:
            with _opened_log(self.log) as log, tempfile.TemporaryFile() as stdin:
                self._log_start = log.tell()
                stdin.write(self._launch.stdin.encode())
                stdin.seek(0)
                self._process = self._spawned(stdin, log)
        except (OSError, subprocess.SubprocessError) as error:
            raise LocalError(f"{self.name} cannot be started: {error}") from error

    def _spawned(self, stdin: IO[bytes], log: IO[bytes]) -> subprocess.Popen[bytes]:
        launch, account = self._launch, self._launch.account
        if launch.capability is not None:
            keep_capabilities(keep=True)
        try:
            return subprocess.Popen(  # noqa: S603 - programs of our own wheels, no shell
                launch.args,
                stdin=stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=launch.env,
                cwd=launch.cwd,
                start_new_session=True,
                # What servers write has names, addresses and prices in it.
                umask=PRIVATE_UMASK,
                # Python changes the user before it calls preexec_fn; the other way round the kernel would
                # forget the death signal.
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
                preexec_fn=_before_exec(launch),  # noqa: PLW1509 - system calls only, nothing that locks
            )
        finally:
            if launch.capability is not None:
                keep_capabilities(keep=False)

    async def ready(self, probe: Probe, *, timeout: float = 120.0) -> None:
        """Return when `probe` says yes. If it raises, stopping is left to the caller.

        Raises:
            ServerDied: the process ended first; the message has the end of its log.
            NotReady: it runs, but the probe said no for `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not await _answers(probe):
            if not self.running:
                raise self.death()
            if time.monotonic() > deadline:
                raise NotReady(f"{self.name}, after {timeout:.0f} s; the end of {self.log}:\n{self.tail()}")
            await asyncio.sleep(POLL)
        if not self.running:  # something else answered in its place
            raise self.death()

    async def wait(self) -> int:
        """Wait for the end; the exit code, negative for a signal."""
        if self._process is None:
            return 0
        await until(lambda: not self.running, math.inf)
        return self._process.returncode

    async def stop(self, stages: Iterable[Stage]) -> None:
        """Send one signal after the other, each with its grace, and SIGKILL in the end; returns when it is gone."""
        try:
            for number, grace in stages:
                self._signal(number)
                await self._gone_within(grace)
        finally:
            self.kill()

    def hurry(self) -> None:
        """Shorten the graces of a `stop` that is under way or to come."""
        self._hurry = True

    def kill(self) -> None:
        """Kill the process at once and wait for the kernel to be done with it."""
        if self._process is not None and self.running:
            self._process.kill()
            self._process.wait()

    def death(self) -> ServerDied:
        """The error that tells of the end: which server, how, and the last lines it logged."""
        code = self._process.poll() if self._process is not None else None
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"exited with code {code}"
        return ServerDied(f"{self.name} {how}; the end of {self.log}:\n{self.tail()}")

    def tail(self, lines: int = 12) -> str:
        """The last lines of this run's log, indented."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                text = log.read()[-20_000:].decode(errors="replace")
        except OSError:
            return "  (no log)"
        return "\n".join(f"  {line}" for line in text.splitlines()[-lines:]) or "  (nothing was logged)"

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(number)

    async def _gone_within(self, grace: float) -> None:
        hurried_end = time.monotonic() + HURRIED_GRACE
        await until(lambda: not self.running or (self._hurry and time.monotonic() > hurried_end), grace)


class LocalServer:
    """A server that runs as one child process, once it was started."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: ServerProcess | None = None

    @property
    def process(self) -> ServerProcess:
        """The running server.

        Raises:
            LocalError: it was not started.
        """
        if self._process is None:
            raise LocalError(f"{self._name} is not started")
        return self._process

    def hurry(self) -> None:
        """Shorten a `stop` that is under way or to come."""
        if self._process is not None:
            self._process.hurry()


async def run_tool(name: str, launch: Launch) -> None:
    """Run a program to its end.

    Raises:
        ServerDied: it failed; the message has the end of its log.
    """
    tool = ServerProcess(name, launch)
    tool.spawn()
    try:
        code = await tool.wait()
    except BaseException:
        tool.kill()
        raise
    if code != 0:
        raise tool.death()


async def until(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait up to `timeout` seconds for a condition of the outside world; whether it came."""
    deadline = time.monotonic() + timeout
    while not (met := condition()) and time.monotonic() < deadline:  # noqa: ASYNC110 - nobody sets an event
        await asyncio.sleep(POLL)
    return met


async def _answers(probe: Probe) -> bool:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            return await probe()
    except TimeoutError:
        return False


def _opened_log(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_KEPT:
        path.replace(path.with_name(path.name + ".old"))
    return open(path, "ab", opener=private)


def private(path: str, flags: int) -> int:
    """An `opener` of files that are for nobody else: not even readable."""
    return os.open(path, flags, 0o600)


def _before_exec(launch: Launch) -> Callable[[], None] | None:
    """What a child runs between fork and exec: it gives up rights, and is made to end with us.

    The kernel does the latter, where it can, and watches the thread that forked: start servers from a thread that
    lives as long as they should.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: a forked child of a threaded process must not load anything
    parent = os.getpid()
    reduce = reduction_to(launch.capability) if launch.capability is not None else None

    def preexec() -> None:
        if reduce is not None:
            reduce()
        prctl(PR_SET_PDEATHSIG, int(launch.if_orphaned), 0, 0, 0)
        if os.getppid() != parent:  # we died before the call
            os._exit(1)

    return preexec


# --- processes of an earlier run -----------------------------------------------------------------------------


async def stop_leftover(
    name: str, pid: int, is_ours: Callable[[int], bool], stages: Iterable[Stage], report: Report
) -> None:
    """Stop a process that an earlier, killed run left behind.

    `is_ours` is asked again before every signal: the number may meanwhile belong to somebody else.

    Raises:
        CannotStop: it is not ours to stop, or it does not go.
    """
    if is_ours(pid):
        report(f"Stopping {name} of an earlier run, process {pid} …")
    for number, grace in stages:
        if not is_ours(pid):
            return
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise CannotStop(f"{name}, process {pid}, belongs to another user: stop it and try again") from error
        await until(lambda: not is_ours(pid), grace)
    if is_ours(pid):
        raise CannotStop(f"{name}, process {pid}: stop it and try again")


def command_line(pid: int) -> list[str]:
    """The arguments of a running process, [] when there is none (or it is a zombie)."""
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
        except OSError:
            return []
    # Spaces inside an argument are lost here; whoever compares looks for what has none or joins it again.
    ps = subprocess.run(  # noqa: S603
        ["/bin/ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return ps.stdout.split()


# --- ports ---------------------------------------------------------------------------------------------------


def listen(host: str, port: int, what: str, option: str) -> socket.socket:
    """A socket bound to `host`:`port` that does not accept yet.

    Raises:
        PortTaken: somebody listens there; the message names the option that chooses another port.
        LocalError: the address or the port is not ours to use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise LocalError(f"{host} is not an address of this machine ({error})") from error
    bound = socket.socket(family, kind, protocol)
    # As the servers do: a port whose last connections are still in TIME_WAIT is free.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except PermissionError as error:
        bound.close()
        raise LocalError(f"port {port} (for {what}) needs more rights; choose another with {option}") from error
    except OSError as error:
        bound.close()
        if error.errno in _NO_SUCH_ADDRESS:
            raise LocalError(f"{host} is not an address of this machine") from error
        raise _taken(port, what, option) from error
    return bound


def check_port(port: int, what: str, option: str) -> None:
    """Make sure that a server can listen on `port` of 127.0.0.1.

    Raises:
        PortTaken: somebody listens there already.
    """
    with socket.socket() as visitor:
        visitor.settimeout(1)
        # BSD lets a specific address be bound beside a wildcard one: binding alone proves nothing there.
        if visitor.connect_ex(("127.0.0.1", port)) == 0:
            raise _taken(port, what, option)
    listen("127.0.0.1", port, what, option).close()


async def listens(port: int) -> bool:
    """Whether somebody listens on `port` of 127.0.0.1."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def check_ports(wanted: Iterable[tuple[int, str, str]]) -> None:
    """`check_port` for several, given as its arguments.

    Raises:
        PortTaken: one or more are; the message names them all.
    """
    with collecting_taken() as collect:
        for port, what, option in wanted:
            with collect():
                check_port(port, what, option)


@contextmanager
def collecting_taken() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Go on after a taken port, for the sake of those who would otherwise be told of one after the other.

    Yields a context manager for each single claim.

    Raises:
        PortTaken: at the end, if any claim did; the message names all ports.
    """
    taken: list[str] = []

    @contextmanager
    def claim() -> Iterator[None]:
        try:
            yield
        except PortTaken as error:
            taken.append(error.detail)

    yield claim
    if taken:
        raise PortTaken(". ".join(taken))


def free_port(usual: int = 0) -> int:
    """A port of 127.0.0.1 where nobody listens: the usual one if it is free.

    Not one the kernel hands out: those are also given to outgoing connections, and a client that redials a server
    which is being restarted could end up with the server's port, or even connected to itself.
    """
    for port in (usual, *(random.randint(20_000, 31_999) for _ in range(1000))):  # noqa: S311 - nothing secret
        if not port or port in _given:
            continue
        try:
            check_port(port, "any", "another try")
        except LocalError:
            continue
        # It is not taken before its server listens, and until then nobody else is to be given it.
        _given.add(port)
        return port
    raise LocalError("no free port between 20000 and 31999")


_given: set[int] = set()


def _taken(port: int, what: str, option: str) -> PortTaken:
    return PortTaken(f"{port}, for {what}; stop what listens there or choose another with {option}")
