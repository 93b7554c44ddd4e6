"""Images of a request: data URLs, and remote ones where they are allowed."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any

from mmfix_evals.serve.errors import ApiError, invalid
from mmfix_evals.serve.fetch import Fetcher
from mmfix_evals.serve.settings import Settings

_DATA = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_REMOTE = re.compile(r"https?://", re.IGNORECASE)


@dataclass
class Pictures:
    """Reads the images of one request, in order, and refuses what is above the limits.

    Args:
        settings: limits.
        fetcher: for remote images; None refuses them.
    """

    settings: Settings
    fetcher: Fetcher | None
    count: int = 0

    def read(self, value: Any, param: str) -> bytes:
        """The bytes of an ``image_url`` part.

        Args:
            value: its ``image_url``: an object with ``url``, or the URL itself.
            param: how the field is called in messages.

        Raises:
            ApiError: not a data URL, not base64, too many images (400), or too many bytes (413).
        """
        url = value.get("url") if isinstance(value, dict) else value
        if not isinstance(url, str):
            raise invalid(param, 'give {"url": "data:image/…;base64,…"}')
        self.count += 1
        if self.count > self.settings.max_images:
            raise ApiError(
                400, f"the request holds more than {self.settings.max_images} images; send fewer", "too_many_images",
                param="messages",
            )  # fmt: skip
        if found := _DATA.match(url):
            return self._decode(url, found.end(), param)
        if not _REMOTE.match(url):
            raise invalid(f"{param}.url", "is neither a data URL with a base64 image nor an http(s) URL")
        if self.fetcher is None:
            raise ApiError(
                400, f"{param}.url is remote, and this server fetches none; send a data URL (data:image/png;base64,…)",
                "remote_images_disabled", param=f"{param}.url",
            )  # fmt: skip
        return self.fetcher.fetch(url)

    def _decode(self, url: str, start: int, param: str) -> bytes:
        limit = self.settings.max_image_bytes
        if (len(url) - start) * 3 // 4 > limit + 2:
            raise self._too_large(param)
        try:
            data = base64.b64decode(url[start:], validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid(f"{param}.url", "is not valid base64; encode the image file again") from error
        if len(data) > limit:
            raise self._too_large(param)
        return data

    def _too_large(self, param: str) -> ApiError:
        return ApiError(
            413, f"an image has more than {self.settings.max_image_mb:g} MB; scale it down", "image_too_large",
            param=f"{param}.url",
        )  # fmt: skip
