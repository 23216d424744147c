"""One `Settings`, built once where a process starts and handed down."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.domain import database_url, hosts
from app.domain.types import DECIMAL_NUMBER
from app.errors import SettingsError

#: A name of a host, or `*.` and one.
_HOST: Final = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9])?)*")

Port = Annotated[int, Field(ge=1, le=65535)]


#: What may stand in a header behind `Bearer `.
VISIBLE: Final = r"[\x21-\x7e]+"
#: What an order without items costs where the built-in sandbox takes the payments, the same figure in every currency.
SANDBOX_DEMO_PRICE: Final = Decimal("50.00")


@dataclass(frozen=True)
class PartnerSettings:
    """How one partner is reached. Without a URL it is the sandbox."""

    name: Literal["payment", "carrier"]
    url: str | None
    token: SecretStr | None
    token_file: Path | None
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None

    def variable(self, field: str) -> str:
        """The environment variable of one of these."""
        return variable(f"{self.name}_{field}")


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
    database_password_file: Path | None = Field(
        None,
        description="File with the password for it, read anew for each connection, so that it can be replaced. The URL "
        "has none then.",
    )
    database_pool_size: PositiveInt = Field(10, description="Most connections per process.")
    database_pooler: Literal["auto", "session", "transaction"] = Field(
        "auto",
        description="Whether a pooler such as PgBouncer may give each transaction another session of PostgreSQL. "
        "`auto`: looked for at each new connection, and assumed of every pooler; `transaction`: it does; `session`: it "
        "does not, so that statements are kept prepared.",
    )
    database_statement_timeout: PositiveFloat = Field(
        10.0, le=10, description="Seconds one SQL statement may take; at most 10, see `app/workflow/policies.py`."
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
    api_host: str = Field("127.0.0.1", description="Address the API listens on; `::`: all of IPv4 and IPv6.")
    api_port: Port = Field(8000, description="Port the API listens on.")
    api_keep_alive_timeout: PositiveInt = Field(
        75,
        description="Seconds a connection to the API may be idle before it is closed. More than the proxy in front of "
        "it allows: a request on a connection that is just being closed is lost, and answered 502.",
    )
    api_header_timeout: PositiveFloat = Field(
        10.0, description="Seconds a client may take for the head of a request, from connecting or its first byte on."
    )
    api_body_timeout: PositiveFloat = Field(
        30.0, description="Seconds a client may take for the body of a request; then it is answered 408."
    )
    api_limit_concurrency: PositiveInt = Field(
        500,
        description="Most requests per process that are worked on at once, besides event streams and probes; one more "
        "is answered 503 with `Retry-After`. Connections beyond these and `TRELLIS_MAX_STREAMS` are closed.",
    )
    allowed_hosts: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None,
        description="Names under which the API may be called, with commas between them; `*.example.com`: every name "
        "below it; `*`: any. Unset: any, but on loopback only `localhost` and its like, unless `TRELLIS_API_HOST` is "
        "another address. IP addresses are always taken.",
    )
    max_streams: PositiveInt = Field(
        500, description="Most event streams per process; one more is answered 503 with `Retry-After`."
    )
    max_streams_per_client: PositiveInt | None = Field(
        None,
        description="Most event streams per process of one client: an IPv4 address, or a /64 of IPv6. One more is "
        "answered 503 with `Retry-After`. Unset: half of `TRELLIS_MAX_STREAMS`. Behind a proxy all clients have its "
        "address, unless `FORWARDED_ALLOW_IPS` names the proxy.",
    )
    stream_max_seconds: PositiveFloat = Field(
        900.0,
        description="Longest time an event stream lasts. It ends in order, and a client goes on by `Last-Event-ID`, as "
        "browsers and `trellis order watch` do by themselves.",
    )

    changes_per_order: PositiveInt = Field(
        100,
        description="Signals of each kind (approve, cancel, address) that a process passes on to one order at once; "
        "more get 429, and there is room for as many again within an hour.",
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

    address_after_review: Literal["allow", "review", "deny"] = Field(
        "allow",
        description="What becomes of another address after the approval. `allow`: the parcel goes there; `review`: it "
        "waits for a second approval, and is refunded without one; `deny`: it is refused.",
    )
    demo_price: Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=2)] | None = Field(
        None,
        description="Price of an order without items, the same figure in every currency; 0: none, `items` is required. "
        "Unset: 50.00 where the built-in sandbox takes the payments, elsewhere none.",
    )

    # Partners
    sandbox: bool = Field(
        False,
        description="Use the built-in sandbox for a partner without a URL. To try things out: no money moves, and no "
        "parcel leaves.",
    )
    payment_url: str | None = Field(
        None,
        description="Payment provider, `https://...` without credentials. Needed, unless `TRELLIS_SANDBOX` is set.",
    )
    payment_token: SecretStr | None = Field(
        None, description="Token for the payment provider, sent as `Authorization: Bearer ...`."
    )
    payment_token_file: Path | None = Field(
        None, description="File with that token, read anew for each call, so that it can be replaced."
    )
    payment_tls_ca: Path | None = Field(
        None, description="File with the CA that signed the payment provider's certificate; unset: those of `certifi`."
    )
    payment_tls_cert: Path | None = Field(
        None, description="File with the client certificate for the payment provider (mTLS)."
    )
    payment_tls_key: Path | None = Field(None, description="File with its private key, unencrypted.")
    carrier_url: str | None = Field(
        None, description="Carrier, `https://...` without credentials. Needed, unless `TRELLIS_SANDBOX` is set."
    )
    carrier_token: SecretStr | None = Field(
        None, description="Token for the carrier, sent as `Authorization: Bearer ...`."
    )
    carrier_token_file: Path | None = Field(
        None, description="File with that token, read anew for each call, so that it can be replaced."
    )
    carrier_tls_ca: Path | None = Field(
        None, description="File with the CA that signed the carrier's certificate; unset: those of `certifi`."
    )
    carrier_tls_cert: Path | None = Field(None, description="File with the client certificate for the carrier (mTLS).")
    carrier_tls_key: Path | None = Field(None, description="File with its private key, unencrypted.")
    partners_allow_http: bool = Field(
        False,
        description="Allow `http://` to partners that are not on this machine: tokens, amounts and addresses are then "
        "readable on the way.",
    )
    partner_timeout: PositiveFloat = Field(
        10.0, le=15, description="Seconds to wait for a partner's answer; at most 15, see `app/workflow/policies.py`."
    )
    sandbox_database_url: SecretStr | None = Field(
        None, description="PostgreSQL of the sandbox's ledger; unset: the product's, in a schema of its own."
    )

    # Faults, for tests only
    failpoints: str | None = Field(None, description="Where this process is to break, see docs/reliability.md.")
    failpoints_allowed: bool = Field(
        False,
        description="Whether this process may be broken at all; a second switch, for none to be left on by mistake.",
    )
    failpoints_seed: int | None = Field(None, description="Makes the dice of the failpoints repeatable.")
    failpoints_log: Path | None = Field(None, description="File to which every hit of a failpoint is added.")

    # Metrics and health; traces are configured by the standard OTEL_* variables
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of `/metrics`, `/healthz` and `/readyz` of this process; 0: none."
    )
    metrics_host: str = Field("127.0.0.1", description="Address that port is on; `::`: all of IPv4 and IPv6.")

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: readable on a terminal, JSON elsewhere."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain_text(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        value = value.strip()  # a file with a secret in it ends with a line feed
        kind: Any = cls.model_fields[str(info.field_name)].annotation
        if _is_number(kind) and not DECIMAL_NUMBER.fullmatch(value):
            # Python takes more for one, among it `1_000` and `inf`.
            raise ValueError("not a number: digits only, with a point where there are more after it")
        return value

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

    @field_validator("payment_url", "carrier_url", mode="before")
    @classmethod
    def _url_without_credentials(cls, url: object, info: ValidationInfo) -> object:
        if not url or not isinstance(url, str):
            return url or None
        _check_url(url, variable(str(info.field_name).replace("url", "token")))
        return url

    @field_validator("payment_token", "carrier_token", mode="before")
    @classmethod
    def _token_fits_a_header(cls, token: object) -> object:
        if isinstance(token, str) and token and not re.fullmatch(VISIBLE, token.strip()):
            raise ValueError("it has characters that no token has: only visible ASCII, without spaces")
        return (token.strip() or None) if isinstance(token, str) else token

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _list_of_hosts(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        names = [name.strip().lower() for name in value.split(",") if name.strip()]
        for name in names:
            if name != "*" and not _HOST.fullmatch(name):
                raise ValueError(f"`{name}` is not a name of a host: no scheme, port or path, such as shop.example.com")
        return names or None

    @model_validator(mode="after")
    def _failpoints_are_allowed(self) -> Self:
        if self.failpoints and not self.failpoints_allowed:
            raise ValueError(
                "TRELLIS_FAILPOINTS breaks this process on purpose: set TRELLIS_FAILPOINTS_ALLOWED=true as well, and "
                "neither of them where orders are real"
            )
        return self

    @property
    def demo_price_in_force(self) -> Decimal | None:
        """What an order without items costs; None: there is no such order."""
        if self.demo_price is None:
            return None if self.payment_url else SANDBOX_DEMO_PRICE
        return self.demo_price or None

    @model_validator(mode="after")
    def _database_has_one_password(self) -> Self:
        file = self.database_password_file
        if file is None:
            return self
        if "password" in database_url.read(self.database_url.get_secret_value()).parameters:
            raise ValueError(
                f"{variable('database_password_file')} is set, and {variable('database_url')} or PGPASSWORD has a "
                "password as well: keep one of them"
            )
        try:
            database_url.password_in(file)
        except database_url.PasswordUnreadable as error:
            raise ValueError(f"{variable('database_password_file')}: {error}") from None
        return self

    @model_validator(mode="after")
    def _deployment_and_build_go_together(self) -> Self:
        given, build = self.temporal_deployment_name, self.temporal_worker_build_id
        if (given is None) != (build is None):
            missing = "TEMPORAL_WORKER_BUILD_ID" if build is None else "TEMPORAL_DEPLOYMENT_NAME"
            raise ValueError(f"{missing} is not set, and the other one is: set both for versioned workers, or neither")
        return self

    @model_validator(mode="after")
    def _partners_are_reached_safely(self) -> Self:
        faults = [fault for partner in (self.payment, self.carrier) for fault in self._faults_of(partner)]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults_of(self, partner: PartnerSettings) -> Iterator[str]:
        if partner.token and partner.token_file:
            yield f"{partner.variable('token')} and {partner.variable('token_file')} are both set: set one"
        if (partner.tls_cert is None) != (partner.tls_key is None):
            missing = partner.variable("tls_key" if partner.tls_key is None else "tls_cert")
            yield f"{missing} is not set: a client certificate needs both its file and its key's"
        if partner.url is None or not partner.url.lower().startswith("http://"):
            return
        if partner.tls_ca or partner.tls_cert:
            yield f"{partner.variable('url')} is http://, and {partner.variable('tls_*')} is set: use https://"
        if not (self.partners_allow_http or is_loopback(partner.url)):
            yield (
                f"{partner.variable('url')} is http:// to another machine: use https://, or allow it with "
                f"{variable('partners_allow_http')}=true"
            )

    @property
    def payment(self) -> PartnerSettings:
        """How the payment provider is reached."""
        return self._partner("payment")

    @property
    def carrier(self) -> PartnerSettings:
        """How the carrier is reached."""
        return self._partner("carrier")

    def _partner(self, name: Literal["payment", "carrier"]) -> PartnerSettings:
        fields = ("url", "token", "token_file", "tls_ca", "tls_cert", "tls_key")
        return PartnerSettings(name, *(getattr(self, f"{name}_{field}") for field in fields))

    def require_partners(self) -> None:
        """Make sure that each partner was chosen: by its URL, or the sandbox by a setting of its own.

        Raises:
            SettingsError: one was not; the message names the variables.
        """
        missing = [partner.variable("url") for partner in (self.payment, self.carrier) if partner.url is None]
        if missing and not self.sandbox:
            raise SettingsError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; to try Trellis without real "
                f"partners, set {variable('sandbox')}=true: no money moves then, and no parcel leaves"
            )


@cache
def _is_number(annotation: Hashable) -> bool:
    return annotation in {int, float, Decimal} or any(map(_is_number, get_args(annotation)))


def variable(name: str) -> str:
    """The environment variable of a setting."""
    field = Settings.model_fields.get(name)
    alias = field.validation_alias if field else None
    return alias if isinstance(alias, str) else f"TRELLIS_{name.upper()}"


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine."""
    try:
        return hosts.is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def _check_url(url: str, token: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(character.isspace() for character in url):
        raise ValueError("it must be https://host or https://host/path")
    if "@" in parts.netloc or parts.query or parts.fragment or "?" in url:
        raise ValueError(
            f"it must be an address and no more: no user, password, key, query or fragment. What is secret belongs "
            f"into {token}"
        )


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
