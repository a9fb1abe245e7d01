"""Fetches a file from its publisher: resumable, verified, or taken from a local copy.

Verification, from the strongest: a hash written down in this repository (``known``), the checksum file that the
publisher keeps beside the data (``publisher``: it protects against damage, not against a changed server), or the hash
of the first download, kept beside the file so that a later one cannot differ unnoticed (``first use``). Which one it
was stands in the provenance of the prepared data. A local copy is hashed; if it differs from a known hash, a warning
says so and the provenance too (``local copy, differs``), since people do repack archives.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pooch
import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from urllib3.exceptions import HTTPError as TransportError

from kdcore.config import UserError
from kdcore.run import write_text

CHUNK = 1 << 18
TIMEOUT = (10.0, 60.0)  # seconds to connect and between two packets
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
logger = logging.getLogger(__name__)
pooch.get_logger().setLevel(logging.WARNING)  # it would name every file it fetches


@dataclass(frozen=True)
class Fetched:
    """A file that lies on disk and what is known of it."""

    path: Path
    hash: str  # "algorithm:hex"
    verified: str  # known, publisher, first use, local copy, or local copy, differs
    url: str

    def provenance(self) -> dict[str, str]:
        """Return what goes into the provenance: no path of this machine."""
        return {"file": self.path.name, "hash": self.hash, "verified": self.verified, "url": self.url}


def cache_folder() -> Path:
    """Return where downloads are kept: ``$KD_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("KD_CACHE") or pooch.os_cache("kdsuite"))


def fetch(
    url: str,
    known_hash: str | None,
    folder: Path,
    *,
    source: Path | None = None,
    checksum_url: str | None = None,
    max_bytes: int = 16 << 30,
    downloader: RangeDownloader | None = None,
) -> Fetched:
    """Return the file at ``url`` from ``folder``, downloaded if it is not there, or the local copy ``source``.

    Options:
        known_hash: "md5:..." or "sha256:...", None where none is known for certain.
        checksum_url: the publisher's checksum file, read if ``known_hash`` is None.
        max_bytes: size at which a download is given up.

    Raises:
        UserError: the file cannot be had, or it is not the file that was expected.
    """
    name = Path(urlsplit(url).path).name
    if source is not None:
        return _local_copy(Path(source), known_hash, url)
    downloader = downloader or RangeDownloader(max_bytes=max_bytes)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    verified = "known"
    if known_hash is None and checksum_url is not None:
        known_hash, verified = downloader.checksum(checksum_url), "publisher"
    remembered = folder / f"{name}.sha256"
    if known_hash is None:
        verified = "first use"
        known_hash = f"sha256:{remembered.read_text(encoding='utf-8').split()[0]}" if remembered.exists() else None
    try:
        path = Path(pooch.retrieve(url, known_hash, fname=name, path=folder, downloader=downloader))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{url}: what came is not what was expected ({known_hash}); if the publisher changed the file on purpose, "
            f"download it yourself and give it with --from PATH"
        ) from error
    if known_hash is None:
        known_hash = hash_file(path)
        write_text(remembered, f"{known_hash.partition(':')[2]}  {name}\n")
        logger.warning("%s: no checksum is published; on this first use it was %s", url, known_hash)
    return Fetched(path, known_hash, verified, url)


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Return "algorithm:hex" of a file."""
    with open(path, "rb") as handle:
        return f"{algorithm}:{hashlib.file_digest(handle, algorithm).hexdigest()}"


def _local_copy(source: Path, known_hash: str | None, url: str) -> Fetched:
    if not source.is_file():
        raise UserError(f"{source}: no such file (given with --from)")
    found = hash_file(source, known_hash.partition(":")[0] if known_hash else "sha256")
    if known_hash is None:
        return Fetched(source, found, "local copy", url)
    if found != known_hash:
        logger.warning("%s: has %s, the publisher's file has %s; used as it is", source, found, known_hash)
        return Fetched(source, found, "local copy, differs", url)
    return Fetched(source, found, "known", url)


@dataclass(frozen=True)
class RangeDownloader:
    """A downloader for pooch that goes on where an earlier one was cut off.

    What has come lies in ``NAME.part`` beside the target, with the server's validator (ETag or Last-Modified) in
    ``NAME.part.json``: the rest is asked for with If-Range, so a file that changed meanwhile begins anew.
    ``attempts`` counts failures in a row without a byte of progress; ``backoff`` seconds double from one to the next.
    """

    attempts: int = 4
    backoff: float = 1.0
    max_bytes: int = 16 << 30

    def __call__(self, url: str, output_file: str | IO[bytes], _: Any = None, check_only: bool = False) -> None:
        """Download ``url`` to ``output_file``, a path that pooch names; the part file lies in the same folder."""
        if check_only or not isinstance(output_file, str | os.PathLike):
            raise TypeError("RangeDownloader writes to a path and does not check for existence only")
        name = Path(urlsplit(url).path).name
        part = Path(output_file).with_name(f"{name}.part")
        failures = 0
        while True:
            before = _size(part)
            try:
                if self._go_on(url, part):
                    break
                problem = "the connection ended early"
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = _reason(error)
            except requests.RequestException as error:
                raise UserError(f"{url}: {_reason(error)}; {_use_from()}") from error
            failures = 1 if _size(part) > before else failures + 1
            if failures >= self.attempts:
                raise UserError(f"{url}: cannot be downloaded: {problem}; {_use_from()}")
            time.sleep(self.backoff * 2 ** (failures - 1))
        os.replace(part, output_file)
        _validator_file(part).unlink(missing_ok=True)

    def checksum(self, url: str) -> str:
        """Return "md5:..." or "sha256:..." from a publisher's checksum file.

        Raises:
            UserError: it cannot be had or holds no such hash.
        """
        try:
            with requests.get(url, timeout=TIMEOUT, stream=True) as response:
                response.raise_for_status()
                text = response.raw.read(4096, decode_content=True).decode("utf-8", "replace")
        except (requests.RequestException, TransportError) as error:
            raise UserError(f"{url}: {_reason(error)}; {_use_from()}") from error
        found = re.search(r"\b(?:[0-9a-fA-F]{64}|[0-9a-fA-F]{32})\b", text)
        if found is None:
            raise UserError(f"{url}: holds no MD5 or SHA-256; {_use_from()}")
        digest = found.group().lower()
        return f"{'md5' if len(digest) == 32 else 'sha256'}:{digest}"

    def _go_on(self, url: str, part: Path) -> bool:
        """Ask for what is missing and append it to ``part``; return whether the file is complete."""
        have = _size(part)
        # identity: a server that compresses on the way would break both the ranges and the hash
        headers = {"Accept-Encoding": "identity"}
        validator = _read_validator(part)
        if have and validator:
            headers |= {"Range": f"bytes={have}-", "If-Range": validator}
        with requests.get(url, headers=headers, timeout=TIMEOUT, stream=True) as response:
            if urlsplit(url).scheme == "https" and urlsplit(response.url).scheme != "https":
                raise UserError(f"{url}: leads to {response.url}, which is not encrypted; refused")
            if response.status_code == 416:  # nothing left to send, or another file: begin anew
                _forget(part)
                return False
            if response.status_code in RETRY_STATUS:
                raise requests.ConnectionError(f"the server answers {response.status_code} {response.reason}")
            response.raise_for_status()
            start, total = _extent(response)
            if start != have:
                _forget(part)
                if start:
                    return False
            if total is not None and total > self.max_bytes:
                raise UserError(f"{url}: is {total} bytes long, more than the limit of {self.max_bytes}")
            _write_validator(part, response)
            return self._receive(response, url, part, start, total)

    def _receive(self, response: requests.Response, url: str, part: Path, start: int, total: int | None) -> bool:
        size = start
        with open(part, "ab") as handle, _progress() as progress:
            task = progress.add_task(part.name.removesuffix(".part"), total=total, completed=start)
            try:
                for chunk in response.raw.stream(CHUNK, decode_content=False):
                    size += len(chunk)
                    if size > self.max_bytes:
                        raise UserError(f"{url}: is longer than the limit of {self.max_bytes} bytes")
                    handle.write(chunk)
                    progress.update(task, completed=size)
            except TransportError as error:
                raise requests.ConnectionError(str(error)) from error
        return total is None or size >= total


def _use_from() -> str:
    return "if you have the file, give it with --from PATH"


def _reason(error: Exception) -> str:
    """Return the innermost message, on one line: requests wraps what happened several times."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answers {error.response.status_code} {error.response.reason}"
    text = str(error)
    if "NameResolutionError" in text or "Failed to resolve" in text:
        return "its host name cannot be resolved (offline?)"
    for sign, meaning in (("refused", "the connection was refused"), ("timed out", "the connection timed out")):
        if sign in text:
            return meaning
    return " ".join(text.split())[:200] or type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _validator_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_validator(part: Path) -> str | None:
    try:
        found = json.loads(_validator_file(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = found.get("validator") if isinstance(found, dict) else None
    return value if isinstance(value, str) else None


def _write_validator(part: Path, response: requests.Response) -> None:
    etag = response.headers.get("ETag", "")
    strong = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    write_text(_validator_file(part), json.dumps({"validator": strong}))


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_file(part).unlink(missing_ok=True)


def _extent(response: requests.Response) -> tuple[int, int | None]:
    """Return where in the file the answer starts and how long the whole file is, if the server says so."""
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None:
            return -1, None  # it does not say what it sends: forget and begin anew
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
