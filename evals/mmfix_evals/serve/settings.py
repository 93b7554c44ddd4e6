"""What the server allows; everything that a client could use to exhaust it has a limit here."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field

from mmfix_evals.errors import UsageError

MEGABYTE = 1_000_000
TEXT_BYTES = 2 * MEGABYTE
"""Room for the texts of one request beside its images."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and access of one server.

    Args:
        name: name under which the model is served.
        max_tokens: most tokens of one answer, and the default where a request gives none.
        max_images: most images of one request, over all its messages.
        max_image_mb: most megabytes (10⁶ bytes) of one image file.
        max_queue: most requests that wait for the one that is being answered; 0 for none.
        allow_remote_images: fetch http(s) images from public addresses.
        api_key: bearer token that requests must carry; None for none.
        local: the server listens on the loopback interface only.
        body_seconds: time that a client has for sending its request.
    """

    name: str
    max_tokens: int = 512
    max_images: int = 4
    max_image_mb: float = 10.0
    max_queue: int = 16
    allow_remote_images: bool = False
    api_key: str | None = field(default=None, repr=False)
    local: bool = True
    body_seconds: float = 60.0

    def __post_init__(self) -> None:
        for option, value, low in (
            ("--max-tokens", self.max_tokens, 1),
            ("--max-images", self.max_images, 0),
            ("--max-queue", self.max_queue, 0),
        ):
            if value < low:
                raise UsageError(f"{option} {value}: give a number of at least {low}")
        if not 0 < self.max_image_mb <= 1000:
            raise UsageError(f"--max-image-mb {self.max_image_mb:g}: give megabytes above 0 and up to 1000")

    @property
    def max_image_bytes(self) -> int:
        """Most bytes of one image file."""
        return int(self.max_image_mb * MEGABYTE)

    @property
    def max_body_bytes(self) -> int:
        """Most bytes of a request: its images in base64, and the texts."""
        return self.max_images * (self.max_image_bytes * 4 // 3 + 1000) + TEXT_BYTES


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_key(variable: str | None) -> str | None:
    """The bearer token in an environment variable; None if no variable is named.

    Raises:
        UsageError: the variable is unset or holds what cannot stand in a header.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UsageError(
            f"the environment variable {variable} is not set; put the token that clients must send into it"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"the token in {variable} holds spaces or characters that no header can carry; choose another")
    return key


def check_exposure(host: str, api_key: str | None, allow_anyone: bool) -> None:
    """Refuse to offer the model to a whole network by accident.

    Raises:
        UsageError: `host` is not the loopback interface and neither a token nor the explicit permission is given.
    """
    if not is_loopback(host) and api_key is None and not allow_anyone:
        raise UsageError(
            f"--host {host} can be reached from other machines and no token protects it; give --api-key-env VARIABLE, "
            "or --allow-anyone if the network is trusted"
        )


def check_port(port: int) -> None:
    """Refuse what is no port; the system would take a larger number modulo 65536.

    Raises:
        UsageError: not from 0 to 65535.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: give a number from 1 to 65535, or 0 for a free one")
