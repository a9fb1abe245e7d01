"""How the service is run: what the command line says, handed to every worker as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

# the environment of a worker carries the settings; keys never travel in it, only the names of their files
VARIABLE = "KD_SERVE_SETTINGS"


@dataclass(frozen=True)
class ServeSettings:
    """One service; every path is absolute."""

    model: str
    # what the workers of one service share: who runs, which model they serve, their metrics
    state: str
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    # of the index, in each worker
    threads: int = 1
    index: str = "auto"
    # recall@10 an approximate index is tuned to
    recall: float = 0.97
    cache: str | None = None
    shadow: str | None = None
    # URL of the event store; None: nothing is stored
    events: str | None = None
    # files: "name key" a line; one key
    api_keys: str | None = None
    admin_key: str | None = None
    # requests a second of one key (of one address, where there are no keys); None: any number
    rate_limit: float | None = None
    max_body: int = 1 << 20
    # seconds a request may take to arrive, and to be answered; seconds a stopping service waits for what it has begun
    receive_timeout: float = 10.0
    answer_timeout: float = 10.0
    drain_timeout: float = 30.0
    max_connections: int = 2048
    # all requests are logged, or only those that failed
    log: str = "all"

    def to_environment(self) -> None:
        """Leave the settings where workers find them."""
        os.environ[VARIABLE] = json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> ServeSettings:
        """Return the settings that the parent left."""
        return cls(**json.loads(os.environ[VARIABLE]))

    @property
    def cache_folder(self) -> Path | None:
        """Where derived files go, None: into the export."""
        return Path(self.cache) if self.cache else None
