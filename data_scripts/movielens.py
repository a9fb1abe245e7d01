"""MovieLens of GroupLens: 100K, 1M, 20M, 25M and 32M ratings, with titles and genres.

The MD5 sums are those that GroupLens publishes beside the archives (``ml-1m.zip.md5``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from apps.recsys.data.dataset import Dataset, load_dataset
from data_scripts.archive import extract
from data_scripts.entry import Entry, Remote, prepare_from
from kdcore.config import UserError

BASE = "https://files.grouplens.org/datasets/movielens/"
CITATION = (
    "F. Maxwell Harper and Joseph A. Konstan (2015). The MovieLens Datasets: History and Context. "
    "ACM Transactions on Interactive Intelligent Systems 5(4), 19"
)
LICENCE = "GroupLens terms: research use, no redistribution without permission, no commercial use without permission"


@dataclass(frozen=True)
class Release:
    """A release: its MD5, the files that are read, the one with the ratings first."""

    md5: str
    size: str
    files: tuple[str, ...]


_CSV = ("ratings.csv", "movies.csv")
RELEASES: Mapping[str, Release] = {
    "ml-100k": Release(
        "0e33842e24a9c977be4e0107933c0723",
        "100,000 ratings, 943 users, 1,682 films; 5 MB",
        ("u.data", "u.item", "u.user"),
    ),
    "ml-1m": Release(
        "c4d9eecfca2ab87c1945afe126590906",
        "1,000,209 ratings, 6,040 users, 3,706 films; 6 MB",
        ("ratings.dat", "movies.dat", "users.dat"),
    ),
    "ml-20m": Release(
        "cd245b17a1ae2cc31bb14903e1204af3", "20,000,263 ratings, 138,493 users, 26,744 films; 190 MB", _CSV
    ),
    "ml-25m": Release(
        "6b51fb2759a8657d3bfcbfc42b592ada", "25,000,095 ratings, 162,541 users, 59,047 films; 250 MB", _CSV
    ),
    "ml-32m": Release(
        "d472be332d4daa821edc399621853b57", "32,000,204 ratings, 200,948 users, 84,432 films; 239 MB", _CSV
    ),
}


def prepare(name: str, out: Path, source: Path | None, options: Mapping[str, Any]) -> Path:
    """Write the prepared folder of a release from the network, a local archive or an unpacked folder."""
    if options:
        raise UserError(f"{name}: has no option {next(iter(options))!r}")
    release = RELEASES[name]

    def convert(files: tuple[Path, ...], scratch: Path) -> Dataset:
        root = files[0]
        if not root.is_dir():
            # the archives hold more than is read here: 32M alone has a gigabyte of tag scores
            root = extract(root, scratch / "unpacked", wanted=lambda path: PurePosixPath(path).name in release.files)
        return load_dataset(_with_ratings(root, release, name), name=name)

    remote = Remote(f"{BASE}{name}.zip", f"md5:{release.md5}")
    return prepare_from(out, name, [remote], source, convert, wanted=lambda path: path.name in release.files)


def _with_ratings(root: Path, release: Release, name: str) -> Path:
    ratings = release.files[0]
    for path in (root / ratings, *sorted(root.glob(f"*/{ratings}"))):
        if path.is_file():
            return path
    raise UserError(f"{root}: holds no {ratings}, which {name} has")


ENTRIES = tuple(
    Entry(
        name=name,
        what="film ratings with times, titles and genres" + (", user age and occupation" if "u" in files[-1] else ""),
        size=release.size,
        licence=LICENCE,
        citation=CITATION,
        url=f"https://grouplens.org/datasets/movielens/{name.removeprefix('ml-')}/",
        prepare=partial(prepare, name),
    )
    for name, release in RELEASES.items()
    for files in [release.files]
)
