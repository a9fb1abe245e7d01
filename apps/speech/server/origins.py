"""Which pages may open a WebSocket: browsers let any page try, and say in ``Origin`` where it came from. No torch."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}


def origin(text: str) -> str:
    """Return an origin as browsers write it: scheme, host and a port that is not the scheme's own, in lower case.

    Raises:
        ValueError: it is none, such as ``null`` or an address with a path.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError(_wrong(text)) from None
    plain = parts.username is None and not (parts.path or parts.query or parts.fragment)
    written = text.isascii() and text.isprintable() and " " not in text
    if parts.scheme not in _PORTS or not (host and plain and written):
        raise ValueError(_wrong(text))
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, _PORTS[parts.scheme]) else "")


def _wrong(text: str) -> str:
    return f"origin: got {text[:80]!r}, wanted one such as https://example.org or http://localhost:3000"


def permitted(origins: list[str], host: str, allowed: Collection[str]) -> bool:
    """Return whether a client may connect.

    Args:
        origins: its ``Origin`` headers; none for what is no browser.
        host: its ``Host`` header: a page of the service itself has the same host and port.
        allowed: further origins, as ``origin`` returns them.
    """
    if not origins:
        return True
    try:
        (found,) = {origin(each) for each in origins}
        return found in allowed or found == origin(f"{urlsplit(found).scheme}://{host}")
    except ValueError:  # none, several, or a host that is none
        return False
