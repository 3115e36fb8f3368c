"""Who may ask, and how often."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from rgalign_ray import config
from rgalign_ray.errors import ConfigError

VARIABLE = "RGALIGN_SERVE_KEYS"
SHORTEST_KEY = 16
OPEN = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})
"""Paths that ask for no key: probes, the page, and the document; they tell nothing of anybody."""


class RefusedError(Exception):
    """A request that is not answered, with the status to say so by."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


def digests(settings: config.Serve) -> dict[str, bytes]:
    """The keys of `serve.keys`, or else of this process's environment, as `Access` knows them.

    Returns:
        the SHA-256 of each, by its name; nothing where none is asked for.

    Raises:
        ConfigError: where the file cannot be read, or a line is not `NAME KEY`.
    """
    where, text = f"${VARIABLE}", os.environ.get(VARIABLE, "")
    if settings.keys is not None:
        where = settings.keys
        try:
            text = Path(settings.keys).read_text()
        except OSError as error:
            raise ConfigError(f"serve.keys: {settings.keys} cannot be read ({error.strerror}).") from None
    found: dict[str, bytes] = {}
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
        name, _, key = line.partition(" ")
        if len(key.strip()) < SHORTEST_KEY or name in found:  # neither is told: both may be the key
            raise ConfigError(
                f"{where}: key {number} must be a name of its own, a space, and at least {SHORTEST_KEY} characters."
            )
        found[name] = digest(key.strip())
    if settings.keys is not None and not found:
        raise ConfigError(f"serve.keys: {settings.keys} holds no key.")
    return found


class Access:
    """Knows keys by their hashes, and counts requests.

    Args:
        keys: as `digests`; empty: everybody may ask.
        rate_per_minute: of a key, or where there is none of an address; None: as often as they like.
    """

    def __init__(self, keys: Mapping[str, bytes], rate_per_minute: int | None) -> None:
        self._keys = dict(keys)
        self._item = RateLimitItemPerMinute(rate_per_minute) if rate_per_minute else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def check(self, path: str, headers: Mapping[str, str], client: str) -> None:
        """Lets a request pass.

        Args:
            path: of the URL.
            headers: by lower-case name.
            client: address.

        Raises:
            RefusedError: 401 without a known key, 429 beyond the rate.
        """
        if path in OPEN:
            return
        who = client
        if self._keys:
            named = self._name(headers)
            if named is None:
                raise RefusedError(
                    401,
                    "a known key is asked for: `Authorization: Bearer KEY` or `X-API-Key: KEY`",
                    {"WWW-Authenticate": "Bearer"},
                )
            who = named
        if self._item is not None and not self._limiter.hit(self._item, who):
            reset = self._limiter.get_window_stats(self._item, who).reset_time
            wait = max(1, math.ceil(reset - time.time()))
            raise RefusedError(429, f"more than {self._item.amount} requests in a minute", {"Retry-After": str(wait)})

    def _name(self, headers: Mapping[str, str]) -> str | None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        told = digest(given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        found = None
        for name, known in self._keys.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(told, known):
                found = name
        return found


def digest(key: str) -> bytes:
    """SHA-256."""
    return hashlib.sha256(key.encode()).digest()
