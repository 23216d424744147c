"""One `Settings`, built once where a process starts and handed down."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app import database_url
from app.errors import SettingsError

Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseSettings):
    """Everything that can be configured, read from `TRELLIS_*` environment variables."""

    model_config = SettingsConfigDict(
        env_prefix="TRELLIS_",
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        # What is wrong may be a password.
        hide_input_in_errors=True,
    )

    # Servers
    database_url: SecretStr = Field(
        SecretStr("postgresql://trellis:trellis@localhost:5432/trellis"),
        description="PostgreSQL of the product.",
    )
    database_pool_size: PositiveInt = Field(10, description="Most connections per process.")
    database_statement_timeout: PositiveFloat = Field(
        10.0, le=10, description="Seconds one SQL statement may take; at most 10, see `app/policies.py`."
    )
    database_acquire_timeout: PositiveFloat = Field(
        2.0,
        le=10,
        description="Seconds the API waits for a free connection, and any statement for a lock, before the answer is "
        "503. Activities wait for a connection as long as their attempt may last.",
    )
    temporal_address: str = Field(
        "localhost:7233",
        pattern=r"^(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}$",
        description="Temporal frontend, host:port.",
    )
    temporal_namespace: str = Field("default", description="Temporal namespace.")
    temporal_api_key: SecretStr | None = Field(None, description="API key, as Temporal Cloud takes it.")
    temporal_tls: bool = Field(False, description="TLS to Temporal; implied by a key or a certificate.")
    temporal_tls_ca: Path | None = Field(None, description="File with the CA that signed the server.")
    temporal_tls_cert: Path | None = Field(None, description="File with the client certificate (mTLS).")
    temporal_tls_key: Path | None = Field(None, description="File with the client's private key (mTLS).")
    temporal_rpc_timeout: PositiveFloat = Field(
        5.0, description="Seconds the API waits for Temporal before it answers 503."
    )
    update_timeout: PositiveFloat = Field(
        10.0, description="Seconds the API waits for a workflow's answer to an update."
    )

    # API
    api_host: str = Field("127.0.0.1", description="Address the API listens on.")
    api_port: Port = Field(8000, description="Port the API listens on.")
    api_keep_alive_timeout: PositiveInt = Field(
        75,
        description="Seconds a connection to the API may be idle before it is closed. More than the proxy in front of "
        "it allows: a request on a connection that is just being closed is lost, and answered 502.",
    )

    # Workers
    order_task_queue: str = Field("default", description="Task queue of `OrderWorkflow` and payments.")
    shipping_task_queue: str = Field("shipping-tq", description="Task queue of `ShippingWorkflow`.")
    max_concurrent_activities: PositiveInt = Field(50, description="Activity slots per worker.")
    max_concurrent_workflow_tasks: PositiveInt = Field(50, description="Workflow task slots per worker.")
    max_cached_workflows: int = Field(1000, ge=0, description="Workflows kept in memory per worker.")
    strict_sandbox: bool = Field(
        False,
        description="Load the workflows' modules anew for every run, so that the sandbox sees what is not "
        "deterministic in them. For tests: it takes a fifth of a worker's CPU time.",
    )
    graceful_shutdown_timeout: PositiveFloat = Field(
        20.0, description="Seconds a stopping worker lets running activities finish."
    )

    # The version of the workers, under the names that the Temporal worker controller gives to what it starts
    temporal_deployment_name: str | None = Field(
        None,
        pattern=r"^[^.:]+$",
        validation_alias="TEMPORAL_DEPLOYMENT_NAME",
        description="Worker deployment that the workers are a version of (`trellis deployment`); unset: none.",
    )
    temporal_worker_build_id: str | None = Field(
        None,
        min_length=1,
        validation_alias="TEMPORAL_WORKER_BUILD_ID",
        description="That version. Set both or neither.",
    )
    versioning_behavior: Literal["auto_upgrade", "pinned"] = Field(
        "auto_upgrade",
        description="`auto_upgrade`: orders move to the version that is current; `pinned`: they end where they began, "
        "and that version must be kept until it is drained.",
    )

    # Orders
    review_timeout_seconds: PositiveInt = Field(
        10, le=30 * 24 * 3600, description="Review window of an order that does not name its own."
    )
    local_steps: bool = Field(
        True,
        description="Try steps of the database where the workflow runs before their task queue does. Off where workers "
        "cache hardly a workflow, or are of a release that does not know it.",
    )
    dispatch_attempts: PositiveInt = Field(
        10, description="Attempts at handing over a parcel before the order is refunded."
    )

    # Partners
    payment_url: str | None = Field(None, description="Payment provider; unset: the built-in sandbox.")
    carrier_url: str | None = Field(None, description="Carrier; unset: the built-in sandbox.")
    partner_timeout: PositiveFloat = Field(
        10.0, le=15, description="Seconds to wait for a partner's answer; at most 15, see `app/policies.py`."
    )
    sandbox_database_url: SecretStr | None = Field(
        None, description="PostgreSQL of the sandbox's ledger; unset: the product's, in a schema of its own."
    )

    # Faults, for tests only
    failpoints: str | None = Field(None, description="Where this process is to break, see docs/reliability.md.")
    failpoints_seed: int | None = Field(None, description="Makes the dice of the failpoints repeatable.")
    failpoints_log: Path | None = Field(None, description="File to which every hit of a failpoint is added.")

    # Metrics and health; traces are configured by the standard OTEL_* variables
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of `/metrics`, `/healthz` and `/readyz` of this process; 0: none."
    )
    metrics_host: str = Field("127.0.0.1", description="Address that port is on.")

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: readable on a terminal, JSON elsewhere."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _without_line_feed(cls, value: Any) -> Any:
        return value.strip() if isinstance(value, str) else value  # a file with a secret in it ends with one

    @field_validator("database_url", "sandbox_database_url")
    @classmethod
    def _both_drivers_can_read_it(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            database_url.read(value.get_secret_value())
        return value

    @field_validator("temporal_tls_ca", "temporal_tls_cert", "temporal_tls_key")
    @classmethod
    def _is_a_file(cls, value: Path | None) -> Path | None:
        if value is not None and not os.access(value, os.R_OK):
            raise ValueError(f"there is no file {value} that this process may read")
        return value

    @model_validator(mode="after")
    def _deployment_and_build_go_together(self) -> Self:
        given, build = self.temporal_deployment_name, self.temporal_worker_build_id
        if (given is None) != (build is None):
            missing = "TEMPORAL_WORKER_BUILD_ID" if build is None else "TEMPORAL_DEPLOYMENT_NAME"
            raise ValueError(f"{missing} is not set, and the other one is: set both for versioned workers, or neither")
        return self


def variable(name: str) -> str:
    """The environment variable of a setting."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else f"TRELLIS_{name.upper()}"


def load(**overrides: Any) -> Settings:
    """The settings of this process; `overrides` go before the environment. A variable that is like one of ours and is
    none is named on standard error, once.

    Raises:
        SettingsError: a value is wrong; the message names the variable and the rule.
    """
    for warning in misspelt(os.environ):
        _warn(warning)
    try:
        return Settings(**overrides)
    except ValidationError as error:
        faults = (
            f"{_variable_of(fault['loc'])}{fault['msg'].removeprefix('Value error, ')}" for fault in error.errors()
        )
        raise SettingsError("; ".join(faults)) from None


#: What else begins like a setting: the command line's own, those of the tests and of compose.yaml, and what Kubernetes
#: sets in every container for a Service whose name begins with ours.
_NO_SETTINGS: Final = re.compile(
    r"TRELLIS_(URL|IMAGE|TEST_.*|.*_SERVICE_(HOST|PORT)(_.*)?|.*_PORT(_\d+_(TCP|UDP|SCTP).*)?)"
)


def misspelt(environment: Mapping[str, str]) -> list[str]:
    """A line for each variable that is no setting, with the one that was probably meant."""
    known = [variable(name) for name in Settings.model_fields]
    lines = []
    for name in sorted(environment):
        if name.startswith("TRELLIS_") and name not in known and not _NO_SETTINGS.fullmatch(name):
            near = difflib.get_close_matches(name, known, n=1)
            lines.append(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
    return lines


@cache
def _warn(line: str) -> None:
    sys.stderr.write(f"trellis: warning: {line}\n")


def _variable_of(place: tuple[int | str, ...]) -> str:
    if not place:
        return ""  # a rule about several, which names them itself
    named = str(place[0])
    return f"{variable(named) if named in Settings.model_fields else named}: "
