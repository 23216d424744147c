"""A database URL, read once and for both drivers alike: asyncpg (the product) and libpq (`trellis migrate`).

Each driver has its own reading of a URL, its own defaults, and its own variables of the environment. So the URL is
read here, in libpq's grammar, and both get what came out of it. A parameter that only one of them would obey is
refused: half of a security setting is none (docs/decisions/0060-one-reading-of-the-database-url.md).
"""

from __future__ import annotations

import getpass
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlencode

from app.domain.hosts import is_loopback


class InvalidDatabaseUrl(ValueError):
    """The URL cannot be read. The message says why, and quotes nothing that could be a password."""


#: Of libpq's variables these count, for what the URL leaves open. No other does: neither where a database is
#: (PGHOSTADDR goes before the host of any URL) nor how a session behaves is left to somebody's shell.
FROM_ENVIRONMENT: Final[Mapping[str, str]] = {
    "PGUSER": "user",
    "PGPASSWORD": "password",
    "PGPASSFILE": "passfile",
    "PGSSLMODE": "sslmode",
    "PGSSLNEGOTIATION": "sslnegotiation",
    "PGSSLROOTCERT": "sslrootcert",
    "PGSSLCERT": "sslcert",
    "PGSSLKEY": "sslkey",
    "PGSSLCRL": "sslcrl",
    "PGSSLMINPROTOCOLVERSION": "ssl_min_protocol_version",
    "PGSSLMAXPROTOCOLVERSION": "ssl_max_protocol_version",
    "PGCHANNELBINDING": "channel_binding",
    "PGREQUIREAUTH": "require_auth",
    "PGTARGETSESSIONATTRS": "target_session_attrs",
}

_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_TLS: Final = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_FILES: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_NUMBERS: Final = (
    *("connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
    "tcp_user_timeout",
)

#: Parameters that both drivers obey, whatever the value.
_FREE: Final = frozenset(
    {
        *("host", "hostaddr", "port", "dbname", "user", "password", "passfile", "sslpassword", "krbsrvname"),
        *("application_name", "fallback_application_name", "options", "channel_binding", "require_auth"),
        *_FILES,
        *_NUMBERS,
    }
)

#: Parameters of which both drivers know these values alone.
_CLOSED: Final[Mapping[str, tuple[str, ...]]] = {
    "sslmode": _MODES,
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": _TLS,
    "ssl_max_protocol_version": _TLS,
    "target_session_attrs": ("any", "primary", "standby", "prefer-standby", "read-write", "read-only"),
    "client_encoding": ("utf8", "UTF8", "utf-8", "UTF-8", "auto"),
    "gssencmode": ("disable", "prefer"),
    "gsslib": ("gssapi",),
    "gssdelegation": ("0",),
    "sslcompression": ("0",),
    "sslsni": ("1",),
    "sslcertmode": ("allow",),
    "load_balance_hosts": ("disable",),
    "min_protocol_version": ("3.0",),
    "max_protocol_version": ("3.0", "3.2", "latest"),
}

_TLS_PARAMETERS: Final = (
    *("sslmode", "sslnegotiation", "sslpassword", "ssl_min_protocol_version", "ssl_max_protocol_version"),
    *_FILES,
)

_QUOTING: Final = "characters with a meaning in a URL are percent-encoded in it: @ is %40, / is %2F, : is %3A, % is %25"


@dataclass(frozen=True)
class DatabaseAddress:
    """A database, and how it is connected to."""

    #: Under libpq's names: what the URL says, completed from the environment and by defaults.
    parameters: Mapping[str, str] = field(repr=False)

    @property
    def hosts(self) -> list[str]:
        """Names, addresses, or directories of Unix sockets, to be tried in this order."""
        return self.parameters["host"].split(",")

    @property
    def place(self) -> str:
        """Host and port, as a message may show them."""
        return ", ".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            for host, port in zip(self.hosts, self.parameters["port"].split(","), strict=True)
        )

    def for_libpq(self, password_file: Path | None = None) -> dict[str, str]:
        """Parameters of `psycopg.connect`."""
        return {**self.parameters, **({"password": password_in(password_file)} if password_file else {})}

    def for_asyncpg(self, password_file: Path | None = None) -> dict[str, Any]:
        """Keyword arguments of `asyncpg.connect` and of a pool, which reads the file anew for each connection."""
        given = self.parameters
        tls = {name: given[name] for name in _TLS_PARAMETERS if name in given}
        return {
            # TLS is what asyncpg takes from a URL only; everything else would be read from it once more.
            "dsn": f"postgresql://?{urlencode(tls)}",
            "host": given.get("hostaddr", given["host"]).split(","),
            "port": [int(port) for port in given["port"].split(",")],
            "user": given["user"],
            "database": given["dbname"],
            "target_session_attrs": given.get("target_session_attrs", "any"),
            **{name: given[name] for name in ("password", "passfile", "krbsrvname", "gsslib") if name in given},
            **({"password": partial(password_in, password_file)} if password_file else {}),
            "server_settings": self._server_settings(),
        }

    @property
    def connect_timeout(self) -> float | None:
        """Seconds for one connection, if the URL says so."""
        return float(self.parameters.get("connect_timeout", 0)) or None

    @property
    def socket_options(self) -> dict[str, int]:
        """libpq's `keepalives*` and `tcp_user_timeout`, which asyncpg has no word for."""
        return {name: int(self.parameters[name]) for name in _NUMBERS[1:] if name in self.parameters}

    def _server_settings(self) -> dict[str, str]:
        given = self.parameters
        named = given.get("application_name") or given.get("fallback_application_name")
        return ({"application_name": named} if named else {}) | (
            {"options": given["options"]} if "options" in given else {}
        )


def read(url: str, environment: Mapping[str, str] = os.environ) -> DatabaseAddress:
    """Read a URL as libpq does, and complete it.

    A database on another machine gets `sslmode=verify-full` unless the URL or PGSSLMODE says another mode, and its
    password only by SCRAM as far as the driver can insist on that.

    Raises:
        InvalidDatabaseUrl: it is not such a URL, or asks for what only one of the drivers can do.
    """
    given = _parameters(url)
    for variable, name in FROM_ENVIRONMENT.items():
        if environment.get(variable) and name not in given:
            given[name] = environment[variable]
    _place(given)
    if "user" not in given:
        given["user"] = _system_user()
    given.setdefault("dbname", given["user"])
    _secure(given)
    _check(given)
    return DatabaseAddress(given)


class PasswordUnreadable(OSError):
    """The file of the password cannot be read, or has none in it."""


def password_in(file: Path) -> str:
    """The password in a file, without the line feed that ends it.

    Raises:
        PasswordUnreadable: there is none.
    """
    try:
        password = file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise PasswordUnreadable(f"{file} cannot be read ({type(error).__name__})") from None
    if not password or re.search(r"[\x00-\x1f\x7f]", password):
        raise PasswordUnreadable(f"{file} is empty, or has a line break or another control character in it")
    return password


# --- the URL


def _parameters(url: str) -> dict[str, str]:
    url = url.strip()  # a file with a secret in it ends with a line feed
    if re.search(r"[\x00-\x1f\x7f]", url):
        raise InvalidDatabaseUrl("it has a line break or another control character in it")
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise InvalidDatabaseUrl("not a URL, such as postgresql://user:password@host:5432/database")
    if scheme not in {"postgresql", "postgres"}:
        raise InvalidDatabaseUrl(f"it begins with {_short(scheme)}://, and not with postgresql://")
    user, password, rest = _credentials(rest)
    place, slash, rest = rest.partition("/") if "/" in rest.partition("?")[0] else (rest.partition("?")[0], "", rest)
    path, _, query = rest.partition("?") if slash else ("", "", rest.partition("?")[2])
    if "@" in place or (user is None and "@" in path):
        raise InvalidDatabaseUrl(f"an @ where none can be: {_QUOTING}")
    hosts, ports = _hosts(place)
    found = {"user": user, "password": password, "host": hosts, "port": ports, "dbname": _decoded(path)}
    return {name: value for name, value in (found | dict(_query(query))).items() if value}


def _credentials(rest: str) -> tuple[str | None, str | None, str]:
    found = re.match(r"([^@/]*)@", rest)
    if found is None:
        return None, None, rest
    user, _, password = found[1].partition(":")
    return _decoded(user), _decoded(password), rest[found.end() :]


def _hosts(place: str) -> tuple[str, str]:
    hosts, ports = [], []
    for part in place.split(",") if place else []:
        found = re.fullmatch(r"(?:\[([^]]*)\]|([^:\[\]]*))(?::([^:]*))?", part)
        if found is None:
            raise InvalidDatabaseUrl("a host is host, host:port or [IPv6 address]:port; several have commas in between")
        hosts.append(_decoded(found[1] or found[2] or ""))
        ports.append(_decoded(found[3] or ""))
    return ",".join(hosts), ",".join(ports) if any(ports) else ""


def _query(query: str) -> Iterator[tuple[str, str]]:
    for part in query.split("&") if query else []:
        name, equals, value = part.partition("=")
        if not equals or "=" in value:
            raise InvalidDatabaseUrl(f"parameter {_short(name)} is not of the form name=value")
        name = _decoded(name)
        if (name, value) == ("ssl", "true"):  # JDBC's, which libpq takes as well
            name, value = "sslmode", "require"
        yield name, _decoded(value)


def _decoded(text: str) -> str:
    if re.search(r"%(?![0-9a-fA-F]{2})|%00", text):
        raise InvalidDatabaseUrl(f"a % that encodes nothing: {_QUOTING}")
    return unquote(text)


def _short(name: str) -> str:
    """What stands where a name belongs; if it does not look like one, it may be a part of a secret."""
    return name if re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.+-]{0,40}", name) else "(not shown)"


# --- what it leaves open


def _place(given: dict[str, str]) -> None:
    given.setdefault("host", given.get("hostaddr") or _socket_directory(given.get("port") or "5432"))
    count = given["host"].count(",") + 1
    ports = [port or "5432" for port in given.get("port", "").split(",")]
    if len(ports) == 1:
        ports *= count
    if len(ports) != count or given.get("hostaddr", given["host"]).count(",") + 1 != count:
        raise InvalidDatabaseUrl(f"{count} hosts, and another number of ports or of hostaddr")
    if not all(port.isascii() and port.isdecimal() and 0 < int(port) < 65536 for port in ports):
        raise InvalidDatabaseUrl(f"a port is a number from 1 to 65535; {_QUOTING}")
    given["port"] = ",".join(ports)


def _socket_directory(port: str) -> str:
    """Where a server of this machine listens. Each driver has been built with another idea of it."""
    folders = ("/run/postgresql", "/var/run/postgresql", "/tmp")  # noqa: S108 - PostgreSQL's own choice
    return next((folder for folder in folders if Path(folder, f".s.PGSQL.{port}").exists()), "localhost")


def _system_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise InvalidDatabaseUrl("it names no user, and this process has no name to take") from None


def _secure(given: dict[str, str]) -> None:
    local = all(map(is_local, given.get("hostaddr", given["host"]).split(",")))
    mode = given.setdefault("sslmode", "prefer" if local else "verify-full")
    if mode.startswith("verify") and given.get("sslrootcert") in {None, "system"}:
        given["sslrootcert"] = _own_root() if "sslrootcert" not in given else ""
        if not given["sslrootcert"]:
            if mode == "verify-ca":
                raise InvalidDatabaseUrl("sslmode=verify-ca needs sslrootcert, the file of the authority that signs")
            given["sslrootcert"] = _system_roots()
    if not local and mode in _MODES[3:] and "sslcert" not in given:
        given.setdefault("require_auth", "scram-sha-256")


def is_local(host: str) -> bool:
    """Whether what is sent there never leaves this machine."""
    return host.startswith("/") or is_loopback(host)


def _own_root() -> str:
    """The file in which libpq looks for authorities by itself."""
    try:
        file = Path.home() / ".postgresql" / "root.crt"
    except RuntimeError:
        return ""
    return str(file) if file.is_file() else ""


def _system_roots() -> str:
    """The authorities that this machine trusts, as one file: a libpq that came in a wheel has no idea of them."""
    import certifi

    return ssl.get_default_verify_paths().cafile or certifi.where()


# --- whether both drivers can do that


def _check(given: dict[str, str]) -> None:
    for name, value in given.items():
        if name in _CLOSED:
            if value not in _CLOSED[name]:
                raise InvalidDatabaseUrl(f"{name} is one of: {', '.join(_CLOSED[name])}")
        elif name not in _FREE:
            raise InvalidDatabaseUrl(
                f"parameter {_short(name)} is not one that both drivers know; what belongs to the server goes into "
                "options, such as options=-csearch_path%3Dshop"
            )
    _check_values(given)
    _check_insistence(given)


def _check_values(given: dict[str, str]) -> None:
    for name in set(_NUMBERS) & given.keys():
        if not (given[name].isascii() and given[name].isdecimal()):
            raise InvalidDatabaseUrl(f"{name} is a number")
    for name in set(_FILES) & given.keys():
        if not os.access(given[name], os.R_OK):
            raise InvalidDatabaseUrl(f"{name}: there is no file {given[name]} that this process may read")


def _check_insistence(given: dict[str, str]) -> None:
    """What asyncpg cannot insist on is needless once the server has proved who it is; else it is refused."""
    if given["sslmode"] == "verify-full":
        if "hostaddr" in given:
            raise InvalidDatabaseUrl(
                "hostaddr goes with no sslmode=verify-full: asyncpg checks the name it connects to"
            )
        return
    if given.get("channel_binding") == "require":
        raise InvalidDatabaseUrl("channel_binding=require needs sslmode=verify-full: asyncpg has no channel binding")
    if "require_auth" in given and not (given["require_auth"] == "scram-sha-256" and given["sslmode"] in _MODES[3:]):
        raise InvalidDatabaseUrl("require_auth needs sslmode=verify-full: asyncpg answers as the server asks")
    if given.get("channel_binding") not in {None, "disable", "prefer"}:
        raise InvalidDatabaseUrl("channel_binding is one of: disable, prefer, require")
