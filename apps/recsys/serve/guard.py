"""Who may ask, and how often: API keys, an admin key, token buckets."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from apps.recsys.serve.schema import ServiceError
from kdcore.config import UserError

_MAX_BUCKETS = 10_000
_MIN_KEY = 16


def read_keys(path: Path) -> list[tuple[str, bytes]]:
    """Return (name, SHA-256 of the key) of every line ``name key``; blank lines and ``#`` comments are passed over.

    Raises UserError with file and row; a key never stands in the message.
    """
    keys: dict[str, bytes] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or len(words[1]) < _MIN_KEY:
            raise UserError(f"{path}: row {number}: wanted a name and a key of at least {_MIN_KEY} characters")
        if words[0] in keys:
            raise UserError(f"{path}: row {number}: the name {words[0]!r} stands there twice")
        keys[words[0]] = _hash(words[1].encode())
    if not keys:
        raise UserError(f"{path}: holds no keys; wanted a name and a key a line")
    return list(keys.items())


def read_admin_key(path: Path) -> bytes:
    """Return the SHA-256 of the one key in a file."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if len(key) < _MIN_KEY or len(key.split()) != 1:
        raise UserError(f"{path}: wanted one key of at least {_MIN_KEY} characters")
    return _hash(key.encode())


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Guard:
    """Admits callers. Keys are compared by hash, in constant time, with every key there is."""

    def __init__(
        self,
        keys: Sequence[tuple[str, bytes]] = (),
        admin: bytes | None = None,
        rate: float | None = None,
        *,
        clock: object = time.monotonic,
    ) -> None:
        """Take the keys, the admin key's hash, and how many requests a second one caller may make (None: any)."""
        self._keys, self._admin, self._rate = list(keys), admin, rate
        self._clock = clock
        # what a caller may spend at once: a second's worth
        self._burst = max(rate or 0.0, 1.0)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    @property
    def open(self) -> bool:
        """Whether anybody may ask as often as they like."""
        return not self._keys and self._rate is None

    def caller(self, key: bytes | None, address: str) -> str:
        """Return the name a key belongs to, or the address where no keys are wanted; ServiceError 401 otherwise."""
        if not self._keys:
            return address
        given, name = _hash(key or b""), None
        for each, wanted in self._keys:
            if hmac.compare_digest(given, wanted):
                name = each
        if name is None or not key:
            raise ServiceError(
                401,
                "unauthorized",
                "wanted an API key: Authorization: Bearer KEY",
                headers={"www-authenticate": "Bearer"},
            )
        return name

    def admit(self, caller: str) -> None:
        """Count one request of a caller; ServiceError 429 if there were too many."""
        if self._rate is None:
            return
        now: float = self._clock()  # type: ignore[operator]
        left, last = self._buckets.pop(caller, (self._burst, now))
        left = min(self._burst, left + (now - last) * self._rate)
        allowed = left >= 1.0
        self._buckets[caller] = (left - 1.0 if allowed else left, now)
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        if not allowed:
            wait = max(1, int((1.0 - left) / self._rate) + 1)
            raise ServiceError(
                429,
                "too_many_requests",
                f"more than {self._rate:g} requests a second",
                headers={"retry-after": str(wait)},
            )

    def admin(self, key: bytes | None) -> None:
        """Let the admin key pass; ServiceError 403 where there is none to have, 401 if this is not it."""
        if self._admin is None:
            raise ServiceError(403, "forbidden", "this service was started without --admin-key")
        if not hmac.compare_digest(_hash(key or b""), self._admin):
            raise ServiceError(
                401,
                "unauthorized",
                "wanted the admin key: Authorization: Bearer KEY",
                headers={"www-authenticate": "Bearer"},
            )
