"""Where a service listens."""

from __future__ import annotations

import socket

from kdcore.config import UserError


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a bound socket that worker processes inherit; UserError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: cannot listen there: {reason}") from None
    listener.set_inheritable(True)
    return listener
