"""Fetching a remote image without becoming a way into the server's own network.

The address that was checked is the one connected to (a second look-up could give another), every redirect is checked
like a first request, and size and time are bounded. Proxies of the environment are not used: they would do the look-up.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from mmfix_evals.serve.errors import ApiError

REDIRECTS = 3
_MOVED = frozenset({301, 302, 303, 307, 308})
# Ranges of "global" IPv6 addresses that a gateway turns into IPv4 addresses of its own network.
_TRANSLATED = tuple(ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet and no private, local, reserved or translated one."""
    found: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif any(found in network for network in _TRANSLATED):
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def _refused(message: str, status: int = 400) -> ApiError:
    return ApiError(status, message, "image_fetch_failed" if status == 400 else "image_too_large", param="messages")


@dataclass(frozen=True)
class Fetcher:
    """Fetches images.

    Args:
        max_bytes: most bytes of one image.
        seconds: time for one image, redirects included.
        allowed: which IP addresses may be connected to.
        ports: which ports; None for any.
    """

    max_bytes: int
    seconds: float = 15.0
    allowed: Callable[[str], bool] = is_public
    ports: Collection[int] | None = (80, 443)

    def fetch(self, url: str) -> bytes:
        """The bytes behind an http(s) URL.

        Raises:
            ApiError: 400 for a URL, address, redirect or answer that is refused, 413 for too many bytes.
        """
        sockets: list[socket.socket] = []
        late = threading.Event()

        def stop() -> None:  # a server that sends a byte now and then defeats time-outs of single reads
            late.set()
            for one in sockets:
                with suppress(OSError):  # closed in the meantime
                    one.shutdown(socket.SHUT_RDWR)

        watchdog = threading.Timer(self.seconds, stop)
        watchdog.daemon = True
        watchdog.start()
        try:
            for _ in range(REDIRECTS + 1):
                answer = self._ask(url, sockets)
                if isinstance(answer, bytes) and not late.is_set():
                    return answer
                if late.is_set():
                    break
                url = str(answer)
            else:
                raise _refused(f"the image URL redirects more than {REDIRECTS} times; give its final address")
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not late.is_set():
                raise _refused(
                    f"the image could not be fetched ({type(error).__name__}); check the URL or send a data URL"
                ) from error
        finally:
            watchdog.cancel()
            for one in sockets:
                one.close()
        raise _refused(f"the image did not arrive within {self.seconds:g} s; send it as a data URL")

    def _ask(self, url: str, sockets: list[socket.socket]) -> bytes | str:
        """One request: the image, or where it has moved to. Its socket goes into `sockets`, for the caller to close."""
        parts = urllib.parse.urlsplit(url)
        connection = self._connect(parts, sockets)
        path = urllib.parse.urlunsplit(("", "", urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~"), "", ""))
        query = f"?{urllib.parse.quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else ""
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "mmfix"}
        connection.request("GET", path + query, headers=headers)
        response = connection.getresponse()
        if response.status in _MOVED:
            return urllib.parse.urljoin(url, response.headers.get("Location", ""))
        if response.status != 200:
            raise _refused(f"the image URL answers with status {response.status}; check it")
        data = response.read(self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise _refused(f"the image behind the URL has more than {self.max_bytes:,} bytes; scale it down", 413)
        return data

    def _connect(self, parts: urllib.parse.SplitResult, sockets: list[socket.socket]) -> http.client.HTTPConnection:
        """A connection to an address of the URL's host that was found to be allowed."""
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _refused("an image URL must be http(s)://host/path or a data URL")
        if parts.username is not None or parts.password is not None:
            raise _refused("an image URL must not hold a user name or password")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if self.ports is not None and port not in self.ports:
            raise _refused(f"port {port} of an image URL is refused; images are fetched from ports 80 and 443 only")
        host = parts.hostname.encode("idna").decode("ascii") if not parts.hostname.isascii() else parts.hostname
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not found or not all(self.allowed(address) for address in found):
            raise _refused("the image URL leads to an address that is not public; send the image as a data URL")
        sockets.append(socket.create_connection((found[0], port), timeout=self.seconds))
        connection = http.client.HTTPConnection(host, port, timeout=self.seconds)
        if parts.scheme == "https":
            # The wrapper takes the socket over, so that it stands in its place.
            sockets[-1] = ssl.create_default_context().wrap_socket(sockets[-1], server_hostname=host)
            connection.default_port = 443  # the Host header then names no port
        connection.sock = sockets[-1]
        return connection
