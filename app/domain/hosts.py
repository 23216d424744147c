"""Which hosts are this machine, and how all of its addresses are listened on."""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Whether a host leads to this machine, by a name or an address that cannot be anybody else's."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    # As a socket for both families shows a caller by IPv4.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. `::` is every address of both families, and of IPv4 alone where this machine has no other.

    Servers that are given `::` as a name take it for IPv6 alone.

    Raises:
        OSError: somebody else has the port, or the address is not of this machine.
    """
    if host == "::" and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"  # noqa: S104 - asked for
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
