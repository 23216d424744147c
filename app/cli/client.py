"""The commands' side of the HTTP API: a call either answers, or ends the command with one line and an exit code."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote, urlsplit

import typer

if TYPE_CHECKING:
    import httpx  # and where it is used: `--help` need not wait for it

DEFAULT_URL: Final = "http://127.0.0.1:8000"

#: Seconds to wait for an answer: longer than the API itself waits for a workflow, so that its reason is heard.
TIMEOUT: Final = 15.0
#: Seconds of silence after which a timeline counts as broken off: its server says something every fifteen.
SILENCE: Final = 45.0

Body = dict[str, Any]

Url = Annotated[str, typer.Option("--url", envvar="TRELLIS_URL", help="Address of the API.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


class ExitCode(IntEnum):
    """What a script can tell from the end of a command."""

    OK = 0
    ENDED_OTHERWISE = 1
    USAGE = 2
    REFUSED = 3
    UNAVAILABLE = 4
    DEFECT = 70


EXIT_CODES: Final = (
    "Exit codes: 0 ok; 1 an order ended otherwise than well (watch, demo, load); 2 wrong usage, or a value the API "
    "refuses (422); 3 the order is unknown or can no longer take this (404, 409); 4 the API or a server behind it is "
    "not available, takes no more for a while (429), or a setting is wrong; 130 interrupted (load)."
)


class CallFailed(Exception):
    """A call did not succeed. The message is the line that says why."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def connect(url: str, *, timeout: float = TIMEOUT, quiet: bool = False) -> Iterator[Api]:
    """The API at `url`, with nothing sent yet. A call that fails inside ends the command, and is not repeated.

    Args:
        timeout: seconds to wait for an answer.
        quiet: do not print why a call failed.
    """
    import httpx

    try:
        with building_client():
            client = httpx.Client(base_url=url, timeout=timeout, trust_env=trusts_environment(url))
        with unanswered(url), client as http:
            yield Api(http, url)
    except CallFailed as failed:
        from app.cli import edge

        if not quiet:
            edge.tell(edge.end_of(failed))
        raise typer.Exit(failed.code) from failed


def trusts_environment(url: str) -> bool:
    """Whether proxies and certificates that the environment names apply: not on this machine, where no proxy knows the
    way to, and what listens is most likely ours."""
    from app.domain.database_url import is_local

    try:
        return not is_local((urlsplit(url).hostname or "").lower())
    except ValueError:
        return True


@contextmanager
def building_client() -> Iterator[None]:
    """Put into words what a client finds wrong with its environment before it asks anybody.

    Raises:
        CallFailed: a proxy that is none, a certificate that is not there.
    """
    import httpx

    try:
        yield
    except httpx.InvalidURL as error:
        raise CallFailed("that is not an address; --url takes http://host:port", ExitCode.USAGE) from error
    except Exception as error:
        names = ", ".join(name for name in _OF_CLIENTS if name in os.environ or name.lower() in os.environ)
        if not names:
            raise
        words = str(error).partition("\n")[0]
        raise CallFailed(f"{names} in the environment: {words}", ExitCode.UNAVAILABLE) from error


#: What httpx reads, and may choke on.
_OF_CLIENTS: Final = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


class Api:
    """Calls, one method a verb. Each returns the answer's JSON, or raises `CallFailed`."""

    def __init__(self, http: httpx.Client, url: str) -> None:
        self._http = http
        self._url = url

    def get(self, path: str, **query: str | int | None) -> Any:
        """Ask. Parameters that are None are left out."""
        return self._call("GET", path, params={name: value for name, value in query.items() if value is not None})

    def post(self, path: str, body: Body | None = None) -> Any:
        """Do."""
        return self._call("POST", path, json=body)

    def put(self, path: str, body: Body) -> Any:
        """Change."""
        return self._call("PUT", path, json=body)

    @contextmanager
    def stream(self, path: str, after: str) -> Iterator[Iterator[ServerSent]]:
        """Server-sent events past the one with the id `after`; entered once the API has agreed to send them."""
        import httpx

        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        timeout = httpx.Timeout(TIMEOUT, read=SILENCE)
        with (
            unanswered(self._url),
            self._http.stream("GET", path, headers=headers, timeout=timeout) as response,
        ):
            if not response.is_success:
                response.read()
                answer(response)
            if response.status_code == HTTPStatus.NO_CONTENT:
                raise CallFailed("the order has ended, and nothing followed the last event seen", ExitCode.REFUSED)
            yield server_sent(response.iter_bytes())

    def _call(self, method: str, path: str, **more: Any) -> Any:
        with unanswered(self._url):
            return answer(self._http.request(method, path, **more))


def order_path(order_id: str, rest: str = "") -> str:
    """Path of an order, or of something of it."""
    return f"/orders/{quote(order_id, safe='')}{rest}"


# --- what an answer means, also for the demo's asynchronous calls


def answer(response: httpx.Response) -> Any:
    """The answer's JSON.

    Raises:
        CallFailed: it is a problem, or not an answer of this API.
    """
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and body is not None:
        return body
    if isinstance(body, dict) and "title" in body:
        raise CallFailed(_problem(response.status_code, body), _exit_code(response.status_code))
    whence = f"{response.url.copy_with(raw_path=b'/')} answered {response.status_code} {response.reason_phrase}"
    # A gateway in front of the API speaks for itself; anything else is somebody else's server.
    hint = "" if response.status_code in {502, 503, 504} else "; is that the API? choose another with --url"
    raise CallFailed(whence + hint, ExitCode.UNAVAILABLE)


@contextmanager
def unanswered(url: str) -> Iterator[None]:
    """Put into words why there was no answer.

    Raises:
        CallFailed: instead of any error of httpx.
    """
    import httpx

    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise CallFailed(f"{url} is not an address; --url takes http://host:port", ExitCode.USAGE) from error
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        reason = f"no API at {url}; is `trellis run` running? choose another with --url"
        raise CallFailed(reason, ExitCode.UNAVAILABLE) from error
    except httpx.TimeoutException as error:
        reason = f"no answer from {url} in time; what was asked may yet be done"
        raise CallFailed(reason, ExitCode.UNAVAILABLE) from error
    except httpx.HTTPError as error:
        reason = f"the connection to {url} broke off ({error or type(error).__name__})"
        raise CallFailed(reason, ExitCode.UNAVAILABLE) from error


def _problem(status: int, problem: dict[str, Any]) -> str:
    title, detail = problem["title"], problem.get("detail")
    return f"{status} {title}" + (f": {detail}" if detail and detail != title else "")


def _exit_code(status: int) -> ExitCode:
    if status in {404, 409}:
        return ExitCode.REFUSED
    return ExitCode.UNAVAILABLE if status == 429 or status >= 500 else ExitCode.USAGE


# --- server-sent events


@dataclass(frozen=True)
class ServerSent:
    """One message of an event stream."""

    id: str
    data: str


def server_sent(chunks: Iterable[bytes]) -> Iterator[ServerSent]:
    """The messages in a byte stream; comments are left out, and so is a message that was not finished."""
    fields: dict[str, list[str]] = {}
    for line in _lines(chunks):
        name, _, value = line.partition(":")
        if name:
            fields.setdefault(name, []).append(value.removeprefix(" "))
        elif not line:
            if "data" in fields:
                yield ServerSent(id=fields.get("id", [""])[-1], data="\n".join(fields["data"]))
            fields = {}


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    # Not `iter_lines` of httpx: it also breaks at U+2028 and its like, which JSON leaves as they are.
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode()
