"""How many files and connections the process may have open. No torch."""

from __future__ import annotations

import logging
import resource

from apps.speech.server.settings import ServeSettings

# the model, listener, event loop, logs, and connections that are accepted only to be refused
_MARGIN = 128
_log = logging.getLogger("kdsuite.serve")


def open_files(settings: ServeSettings) -> int:
    """Return how many files a service may have open at once: both kinds of connections, an upload each, a margin."""
    return 3 * settings.max_connections + _MARGIN


def allow_open_files(settings: ServeSettings) -> int:
    """Raise the soft limit of open files as far as the service needs and the hard limit lets it; return the limit.

    A limit that is high enough is left as it is; one that stays too low is said in the log.
    """
    wanted = open_files(settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # macOS has a limit below its hard one
        allowed = soft
    if allowed < wanted:
        message = f"--max-connections {settings.max_connections} needs {wanted} open files: raise the hard limit"
        _log.warning("few_open_files", extra={"fields": {"message": message, "wanted": wanted, "allowed": allowed}})
    return allowed
