"""temporal-server on PostgreSQL, as production has it but for its size: all four services in one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from app.local.postgres import PASSWORD, USER, LocalPostgres
from app.local.process import Launch, LocalServer, ServerProcess, free_port, run_tool

NAME = "temporal-server"
_PLUGIN = "postgres12"
_SCHEMAS = {"temporal": "postgresql/v12/temporal", "temporal_visibility": "postgresql/v12/visibility"}
_SERVICES = ("frontend", "history", "matching", "worker")

#: The chart's number. More of them are for more than one history process.
_SHARDS = 4


def find_programs() -> Path | None:
    """The directory with temporal-server and temporal-sql-tool: on the PATH, or on the one that CLUSTER_KIT sets."""
    path = os.environ.get("PATH", "")
    if kit := shutil.which(os.environ.get("CLUSTER_KIT", "")):
        told = subprocess.run([kit, "env"], capture_output=True, text=True, check=False).stdout
        path = ":".join([path, *re.findall(r"PATH=(/[^:;]+)", told)])
    found = [shutil.which(program, path=path) for program in (NAME, "temporal-sql-tool")]
    return Path(found[0]).parent if found[0] and found[1] else None


def temporal_server_version(programs: Path) -> str:
    """Its release."""
    told = subprocess.run([programs / NAME, "--version"], capture_output=True, text=True, check=True).stdout
    return told.split()[-1]


class TemporalOnPostgres(LocalServer):
    """One temporal-server on 127.0.0.1, with its two databases on `postgres`. Looks like `LocalTemporal`."""

    def __init__(
        self, programs: Path, postgres: LocalPostgres, data: Path, dynamic_config: Mapping[str, object]
    ) -> None:
        super().__init__(NAME)
        self._dynamic_config = dynamic_config
        self._programs = programs
        self._postgres = postgres
        self._data = data
        self._log = data / f"{NAME}.log"
        self.port = free_port()

    @property
    def address(self) -> str:
        """The frontend, as `Client.connect` takes it."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Make the schema, start the server; returns when its namespace answers."""
        for database, schema in _SCHEMAS.items():
            await self._postgres.ensure_database(database)
            await self._sql_tool(database, "setup-schema", "-v", "0.0")
            await self._sql_tool(database, "update-schema", "--schema-name", schema)
        config, dynamic = self._data / f"{NAME}.yaml", self._data / f"{NAME}-dynamic.yaml"
        config.write_text(json.dumps(self._config(dynamic)))  # JSON is YAML
        dynamic.write_text(json.dumps({key: [{"value": value}] for key, value in self._dynamic_config.items()}))
        args = [str(self._programs / NAME), "--config-file", str(config), "--allow-no-auth", "start"]
        self._process = ServerProcess(NAME, Launch(args, self._log, cwd=self._data))
        self._process.spawn()
        try:
            await self._process.ready(self._is_ready)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server; its databases stay."""
        if self._process is not None:
            await self._process.stop([(signal.SIGTERM, 15.0)])

    async def _sql_tool(self, database: str, *command: str) -> None:
        tool = [str(self._programs / "temporal-sql-tool"), "--plugin", _PLUGIN, "--endpoint", "127.0.0.1"]
        tool += ["--port", str(self._postgres.port), "--user", USER, "--database", database, *command]
        await run_tool("temporal-sql-tool", Launch(tool, self._log, {**os.environ, "SQL_PASSWORD": PASSWORD}))

    async def _is_ready(self) -> bool:
        try:
            client = await Client.connect(self.address)
            await client.workflow_service.register_namespace(
                RegisterNamespaceRequest(
                    namespace="default", workflow_execution_retention_period=Duration(seconds=24 * 3600)
                )
            )
        except RPCError as error:
            if error.status is not RPCStatusCode.ALREADY_EXISTS:
                return False
        except RuntimeError:
            return False
        return await self._takes_work()

    async def _takes_work(self) -> bool:
        """Whether the namespace is known by name, which takes its cache some seconds."""
        client = await Client.connect(self.address)
        try:
            await client.count_workflows("")
        except RPCError:
            return False
        return True

    def _config(self, dynamic: Path) -> dict[str, Any]:
        def store(database: str, connections: int) -> dict[str, Any]:
            return {
                "sql": {
                    "pluginName": _PLUGIN,
                    "databaseName": database,
                    "connectAddr": f"127.0.0.1:{self._postgres.port}",
                    "connectProtocol": "tcp",
                    "user": USER,
                    "password": PASSWORD,
                    "maxConns": connections,
                    "maxIdleConns": connections,
                    "maxConnLifetime": "1h",
                }
            }

        def service(name: str) -> dict[str, Any]:
            port = self.port if name == "frontend" else free_port()
            return {"rpc": {"grpcPort": port, "membershipPort": free_port(), "bindOnIP": "127.0.0.1"}}

        return {
            "log": {"stdout": True, "level": "warn"},
            "persistence": {
                "numHistoryShards": _SHARDS,
                "defaultStore": "default",
                "visibilityStore": "visibility",
                "datastores": {"default": store("temporal", 20), "visibility": store("temporal_visibility", 10)},
            },
            "global": {"membership": {"maxJoinDuration": "30s"}},
            "services": {name: service(name) for name in _SERVICES},
            "clusterMetadata": {
                "failoverVersionIncrement": 10,
                "masterClusterName": "active",
                "currentClusterName": "active",
                "clusterInformation": {
                    "active": {
                        "enabled": True,
                        "initialFailoverVersion": 1,
                        "rpcName": "frontend",
                        "rpcAddress": self.address,
                    }
                },
            },
            "publicClient": {"hostPort": self.address},
            "dynamicConfigClient": {"filepath": str(dynamic), "pollInterval": "1m"},
        }
