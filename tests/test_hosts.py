"""Which hosts are this machine, and listening on all of its addresses."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import httpx
import pytest

from app.domain.hosts import bind, is_loopback
from app.local.process import free_port

_API = """
import sys, uvicorn
from app.cli.serve import run_server
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})
run_server(uvicorn.Config(app, host="::", port=int(sys.argv[1]), lifespan="off"))
"""

no_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *((host, True) for host in ("localhost", "127.0.0.1", "::1", "::ffff:127.0.0.1")),
        *((host, False) for host in ("::ffff:10.1.2.3", "10.1.2.3", "fd00::1", "example.com", "")),
    ],
)
def test_a_loopback_address_is_one_in_either_spelling(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_where_there_is_no_ipv6_all_addresses_are_those_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with bind("::", 0) as bound:
        assert bound.family == socket.AF_INET


@no_ipv6
def test_a_taken_port_is_said() -> None:
    with bind("::", 0) as bound:
        bound.listen()
        with pytest.raises(OSError, match="in use"):
            bind("::", bound.getsockname()[1])


@no_ipv6
def test_the_api_answers_on_both_families() -> None:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", _API, str(port)], stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(trust_env=False) as client:
            for address in ("127.0.0.1", "[::1]"):
                assert _answer(client, f"http://{address}:{port}/") == 204
    finally:
        process.terminate()
        process.wait()


def _answer(client: httpx.Client, url: str) -> int:
    until = time.monotonic() + 15
    while True:
        try:
            return client.get(url).status_code
        except httpx.TransportError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
