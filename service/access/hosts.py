"""Addresses and names: which are this machine's own, and what a browser says of where a request comes from.

A web page can make a name of its own resolve to 127.0.0.1 and so reach what listens there; what it cannot do is send
another name than its own in Host. So a name counts as this machine's only where nobody else can have it.
"""

import ipaddress
import re
import socket
from collections.abc import Set
from functools import lru_cache
from typing import Final

# Host, and what follows the scheme in Origin: a name or an address, and maybe a port.
_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_ORIGIN: Final = re.compile(rb"[a-z][a-z0-9+.-]*://([^/]+)")
_NAME: Final = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9._-]+")


def parse_hosts(text: str) -> frozenset[str]:
    """Names and addresses apart by commas, as they stand in Host, without ports. Raises ValueError."""
    names = frozenset(name.strip().lower() for name in text.split(","))
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError("names are given as in Host, without ports, apart by commas: localhost,127.0.0.1,[::1]")
    return names


def is_loopback(address: str) -> bool:
    """Of an IP address in text."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


# The addresses of this machine that connections come in at are few.
is_own: Final = lru_cache(64)(is_loopback)


def listens_locally(host: str) -> bool:
    """Whether every address that `host` stands for, as one to listen on, is this machine's own; "" is all of them."""
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return all(is_loopback(str(entry[4][0])) for entry in found)


def name_in(host: bytes) -> str | None:
    """The name in the value of a Host header, in lower case; None where it is none."""
    found = _HOST.fullmatch(host)
    return None if found is None else found[1].decode().lower().removesuffix(".")


def host_of(origin: bytes) -> bytes | None:
    """What Host is for the page of this Origin; None where it does not say, as `null` does not."""
    found = _ORIGIN.fullmatch(origin)
    return None if found is None else found[1]


def is_allowed(host: bytes, allowed: Set[str] | None) -> bool:
    """Whether the value of a Host header names one of those `allowed`; None: this machine, by an address of loopback,
    `localhost`, a name below it, or what the machine calls itself.
    """
    name = name_in(host)
    if name is None:
        return False
    if allowed is not None:
        return name in allowed
    if name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower():
        return True
    return is_loopback(name[1:-1] if name.startswith("[") else name)
