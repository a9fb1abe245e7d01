"""What the catalogue knows of a data set, and the one way from a publisher's files to a prepared folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.recsys.data.dataset import Dataset
from apps.recsys.data.store import write_canonical
from data_scripts.download import Fetched, cache_folder, fetch, hash_file
from data_scripts.prepared import description, is_prepared, preparing
from kdcore.config import UserError
from kdcore.run import fingerprint

PREPARATION = 1  # raised when the same source is prepared into something else


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue; ``prepare(out, source, options)`` writes the prepared folder ``out`` and returns it."""

    name: str
    what: str
    size: str
    licence: str
    citation: str
    url: str
    prepare: Callable[[Path, Path | None, Mapping[str, Any]], Path]
    simulated: bool = False


@dataclass(frozen=True)
class Remote:
    """A file of a publisher: its address, its hash where one is known for certain, else its checksum file."""

    url: str
    known_hash: str | None = None
    checksum_url: str | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Material:
    """What a data set is made from: files by name, or a folder that the user gave, and how to recognise it again."""

    identity: Mapping[str, str]
    files: tuple[Path, ...]
    provenance: list[dict[str, str]]


def prepare_from(
    out: Path,
    name: str,
    remotes: Iterable[Remote],
    source: Path | None,
    convert: Callable[[tuple[Path, ...], Path], Dataset],
    *,
    wanted: Callable[[Path], bool] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Get the files, convert them and write the prepared folder; do nothing if ``out`` was made from the same.

    ``convert(files, scratch)`` gets the downloaded files or the local copies and an empty folder for its own use.
    ``source`` is a copy of the file, a folder with copies of the files (gz files also without their .gz), or, where
    ``wanted`` is given, the unpacked folder, of whose files it tells those that matter.
    """
    remotes = tuple(remotes)
    base = {"name": name, "simulated": False, "preparation": PREPARATION, "options": dict(options or {})}
    known = {remote.url: remote.known_hash for remote in remotes}
    if source is None and _is_current(out, base, known):
        return Path(out)
    material = _gather(remotes, source, wanted)
    record = {**base, "source": dict(material.identity)}
    if is_prepared(out, record):
        return Path(out)
    with preparing(out, record) as (folder, details):
        scratch = folder / "scratch"
        scratch.mkdir()
        dataset = convert(material.files, scratch)
        shutil.rmtree(scratch)
        write_canonical(dataset, folder)
        details["provenance"] = material.provenance
    return Path(out)


def _is_current(out: Path, base: Mapping[str, Any], known: Mapping[str, str | None]) -> bool:
    """Return whether ``out`` was made from these addresses: then nothing has to be downloaded to find out."""
    found = description(out) or {}
    if any(found.get(name) != value for name, value in base.items()) or "source_fingerprint" not in found:
        return False
    made_of = found.get("source")
    if not isinstance(made_of, dict) or set(made_of) != set(known):
        return False
    return all(wanted is None or made_of[url] == wanted for url, wanted in known.items())


def _gather(remotes: tuple[Remote, ...], source: Path | None, wanted: Callable[[Path], bool] | None) -> Material:
    copies: list[Path] | None = None
    if source is not None:
        copies = _copies(remotes, Path(source))
        if copies is None:
            return _unpacked(remotes, Path(source), wanted)
    fetched: list[Fetched] = []
    for number, remote in enumerate(remotes):
        copy = copies[number] if copies else None
        fetched.append(
            fetch(remote.url, remote.known_hash, cache_folder(), source=copy, checksum_url=remote.checksum_url)
        )
    return Material(
        {each.url: each.hash for each in fetched},
        tuple(each.path for each in fetched),
        [each.provenance() for each in fetched],
    )


def _copies(remotes: tuple[Remote, ...], source: Path) -> list[Path] | None:
    """Return the local copies of the files; None if ``source`` is a folder that lacks some."""
    if source.is_dir():
        copies = []
        for remote in remotes:
            found = _search(source, remote.name) or _search(source, remote.name.removesuffix(".gz"))
            if not found:
                return None
            copies.append(found[0])
        return copies
    if len(remotes) > 1:
        raise UserError(f"{source}: wanted a folder with {' and '.join(remote.name for remote in remotes)}")
    return [source]


def _unpacked(remotes: tuple[Remote, ...], source: Path, wanted: Callable[[Path], bool] | None) -> Material:
    files = [path for path in _search(source, "*") if path.is_file() and wanted is not None and wanted(path)]
    if not files:
        names = " and ".join(remote.name for remote in remotes)
        raise UserError(f"{source}: holds neither {names} nor the files that are in it")
    hashes = {path.name: hash_file(path) for path in files}
    provenance = [{"file": name, "hash": found, "verified": "local copy"} for name, found in hashes.items()]
    return Material({"folder": fingerprint(hashes)}, (source,), provenance)


def _search(folder: Path, pattern: str) -> list[Path]:
    """Return what matches in the folder or one below it: how an archive with a top folder unpacks."""
    return [*sorted(folder.glob(pattern)), *sorted(folder.glob(f"*/{pattern}"))]
