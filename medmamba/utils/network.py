"""Checks within seconds whether a server can be reached, before a client starts its retries."""

import errno
import socket
import threading
import urllib.request
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 2.0  # seconds for a name to be resolved

_NO_ROUTE = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


def unreachable(url: str) -> str | None:
    """Returns why the server of an address cannot be reached; None if it can, or if only a request would show.

    Nothing is sent: its name is resolved and a connection opened. Where a proxy is set, that is left to the proxy.
    """
    parts = urlsplit(url)
    host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    if host is None:
        return f"{url} has no host"
    proxies = urllib.request.getproxies()
    if (parts.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(host):
        return None
    addresses = _resolved(host, port)
    if isinstance(addresses, str):
        return addresses
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
    except TimeoutError:
        return None  # slow, perhaps
    except OSError as error:
        if error.errno in _NO_ROUTE:
            return f"no connection to {host}: {error.strerror}"
    return None


def _resolved(host: str, port: int) -> list[Any] | str:
    """Resolves a host in a thread, as resolvers have no timeout; returns its addresses or the reason for failure."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            found.append(f"the name {host} cannot be resolved: {error.strerror or error}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[0] if found else f"the name {host} was not resolved within {PATIENCE:g} seconds"
