"""Downloads against a real server that drops connections, ignores ranges, changes files and sends wrong ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from data_scripts.download import Fetched, RangeDownloader, fetch, hash_file
from kdcore.config import UserError

CONTENT = bytes(range(256)) * 4000  # a megabyte, in which every position can be told from its neighbours
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
QUICK = RangeDownloader(backoff=0.0)


@dataclass
class Site:
    """What the server does, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=lambda: {"/data.bin": CONTENT})
    drops: list[int] = field(default_factory=list)  # bytes after which each next answer is cut off
    statuses: list[int] = field(default_factory=list)  # errors to answer first
    ranges: bool = True
    etag: str | None = '"one"'
    headers: dict[str, str] = field(default_factory=dict)
    length: bool = True
    asked: list[str | None] = field(default_factory=list)  # the Range header of every request
    sent: int = 0
    url: str = ""


def handler_of(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            site.asked.append(asked)
            if site.statuses:
                self.send_error(site.statuses.pop(0))
                return
            if self.path not in site.files:
                self.send_error(404)
                return
            body = site.files[self.path]
            start = 0
            if asked and site.ranges and self.headers.get("If-Range") in (None, site.etag):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(body):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            if site.length:
                self.send_header("Content-Length", str(len(body) - start))
            if site.etag:
                self.send_header("ETag", site.etag)
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            end = start + site.drops.pop(0) if site.drops else len(body)
            site.sent += len(body[start:end])
            self.wfile.write(body[start:end])

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(site))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def get(site: Site, folder: Path, known: str | None = MD5, downloader: RangeDownloader = QUICK) -> Fetched:
    return fetch(f"{site.url}/data.bin", known, folder, downloader=downloader)


def test_downloads_once_and_leaves_nothing_else(site: Site, tmp_path: Path) -> None:
    fetched = get(site, tmp_path)
    assert fetched.path.read_bytes() == CONTENT
    assert (fetched.hash, fetched.verified) == (MD5, "known")
    assert get(site, tmp_path) == fetched
    assert len(site.asked) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_resumes_when_the_connection_drops(site: Site, tmp_path: Path) -> None:
    site.drops = [400_000, 300_000]
    assert get(site, tmp_path).path.read_bytes() == CONTENT
    assert site.asked == [None, "bytes=400000-", "bytes=700000-"]
    assert site.sent == len(CONTENT)  # nothing was sent twice


def test_resumes_in_a_later_run(site: Site, tmp_path: Path) -> None:
    site.drops = [500_000]
    with pytest.raises(UserError, match="--from PATH"):
        get(site, tmp_path, downloader=RangeDownloader(attempts=1, backoff=0.0))
    assert (tmp_path / "data.bin.part").read_bytes() == CONTENT[:500_000]
    assert get(site, tmp_path).path.read_bytes() == CONTENT
    assert site.asked == [None, "bytes=500000-"]


def test_a_server_that_ignores_ranges_begins_anew(site: Site, tmp_path: Path) -> None:
    site.ranges, site.drops = False, [400_000]
    assert get(site, tmp_path).path.read_bytes() == CONTENT
    assert site.asked == [None, "bytes=400000-"]


def test_a_file_that_changed_meanwhile_begins_anew(site: Site, tmp_path: Path) -> None:
    site.files["/data.bin"], site.drops = b"old" * 100_000, [100_000]
    with pytest.raises(UserError):
        get(site, tmp_path, downloader=RangeDownloader(attempts=1, backoff=0.0))
    site.files["/data.bin"], site.etag = CONTENT, '"two"'
    assert get(site, tmp_path).path.read_bytes() == CONTENT


def test_without_a_validator_nothing_is_resumed(site: Site, tmp_path: Path) -> None:
    site.etag, site.drops = None, [400_000]
    assert get(site, tmp_path).path.read_bytes() == CONTENT
    assert site.asked == [None, None]


def test_a_part_longer_than_the_file_begins_anew(site: Site, tmp_path: Path) -> None:
    site.drops = [500_000]
    with pytest.raises(UserError):
        get(site, tmp_path, downloader=RangeDownloader(attempts=1, backoff=0.0))
    with open(tmp_path / "data.bin.part", "ab") as part:
        part.write(bytes(len(CONTENT)))
    assert get(site, tmp_path).path.read_bytes() == CONTENT


def test_a_damaged_file_is_refused_and_not_kept(site: Site, tmp_path: Path) -> None:
    site.files["/data.bin"] = CONTENT[:-1] + b"!"
    with pytest.raises(UserError, match=r"not what was expected.*--from PATH"):
        get(site, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_found_by_the_hash(site: Site, tmp_path: Path) -> None:
    site.drops = [500_000]
    with pytest.raises(UserError):
        get(site, tmp_path, downloader=RangeDownloader(attempts=1, backoff=0.0))
    with open(tmp_path / "data.bin.part", "r+b") as part:
        part.write(b"damage")
    with pytest.raises(UserError, match="not what was expected"):
        get(site, tmp_path)
    assert get(site, tmp_path).path.read_bytes() == CONTENT  # the damaged part is gone


def test_errors_of_the_server(site: Site, tmp_path: Path) -> None:
    site.statuses = [503, 429]
    assert get(site, tmp_path / "again").path.read_bytes() == CONTENT
    site.asked.clear()
    with pytest.raises(UserError, match=r"404.*--from PATH"):
        fetch(f"{site.url}/none.bin", MD5, tmp_path, downloader=QUICK)
    assert len(site.asked) == 1  # asking again would not help


def test_offline(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = server.server_port
    server.server_close()
    with pytest.raises(UserError, match=r"refused.*--from PATH") as caught:
        fetch(f"http://127.0.0.1:{port}/data.bin", MD5, tmp_path, downloader=QUICK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [True, False])
def test_too_long_a_file(site: Site, tmp_path: Path, length: bool) -> None:
    site.length = length
    with pytest.raises(UserError, match="limit of 1000"):
        get(site, tmp_path, downloader=RangeDownloader(backoff=0.0, max_bytes=1000))


def test_encryption_is_not_given_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    response = requests.Response()
    response.status_code, response.url, response.raw = 200, "http://example.invalid/data.bin", io.BytesIO(CONTENT)
    monkeypatch.setattr(requests, "get", lambda *_, **__: response)
    with pytest.raises(UserError, match="not encrypted"):
        fetch("https://example.invalid/data.bin", MD5, tmp_path, downloader=QUICK)


def test_first_use_is_remembered(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fetched = get(site, tmp_path, known=None)
    assert fetched.verified == "first use"
    assert fetched.hash == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    assert fetched.hash in caplog.text
    fetched.path.unlink()
    assert get(site, tmp_path, known=None) == fetched
    fetched.path.unlink()
    site.files["/data.bin"] = b"something else"
    with pytest.raises(UserError, match="not what was expected"):
        get(site, tmp_path, known=None)


@pytest.mark.parametrize("text", ["MD5 (data.bin) = {}\n", "{}  data.bin\n"])
def test_the_publishers_checksum(site: Site, tmp_path: Path, text: str) -> None:
    site.files["/data.bin.md5"] = text.format(MD5.removeprefix("md5:").upper()).encode()
    url = f"{site.url}/data.bin"
    fetched = fetch(url, None, tmp_path, checksum_url=f"{url}.md5", downloader=QUICK)
    assert (fetched.hash, fetched.verified) == (MD5, "publisher")
    site.files["/data.bin.md5"] = b"<html>moved</html>"
    with pytest.raises(UserError, match="no MD5"):
        fetch(url, None, tmp_path, checksum_url=f"{url}.md5", downloader=QUICK)


def test_what_is_compressed_stays_compressed(site: Site, tmp_path: Path) -> None:
    packed = gzip.compress(CONTENT)
    site.files["/data.bin"], site.headers = packed, {"Content-Encoding": "gzip"}  # as servers label .gz files
    assert get(site, tmp_path, known=None).path.read_bytes() == packed


def test_a_local_copy(tmp_path: Path) -> None:
    copy = tmp_path / "mine.bin"
    copy.write_bytes(CONTENT)
    url = "https://example.invalid/data.bin"
    assert fetch(url, MD5, tmp_path, source=copy) == Fetched(copy, MD5, "known", url)
    assert fetch(url, None, tmp_path, source=copy).verified == "local copy"
    other = fetch(url, "md5:" + "0" * 32, tmp_path, source=copy)
    assert (other.verified, other.hash) == ("local copy, differs", MD5)
    assert str(tmp_path) not in str(other.provenance())
    with pytest.raises(UserError, match="no such file"):
        fetch(url, MD5, tmp_path, source=tmp_path / "none")


def test_hash_file_agrees_with_hashlib(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    assert hash_file(tmp_path / "a", "md5") == MD5
