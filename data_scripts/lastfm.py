"""Last.FM of HetRec 2011 (GroupLens): who listened to which artist how often, and who tagged whom when.

Listens have counts but no times, tag assignments have times but no counts, so there are two data sets: ``lastfm-2k``
(the listening count is the rating; no timestamps) and ``lastfm-2k-tags`` (a user's first tag of an artist, with its
time). In both an artist has its name as the title and the ten tags given most often as ``tags``. Some assignments
carry times from before Last.fm began; they are left out and counted.

GroupLens publishes no checksum for this archive; the SHA-256 is the one that several public projects recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from apps.recsys.data.dataset import Dataset, load_dataset
from data_scripts.archive import extract
from data_scripts.entry import Entry, Remote, prepare_from
from kdcore.config import UserError

URL = "https://files.grouplens.org/datasets/hetrec2011/hetrec2011-lastfm-2k.zip"
SHA256 = "6738f48195667ff03caaab4d32ca9a3133d8cc026b7c3cdaf6ce1010e913c59c"
LISTENS, ARTISTS, TAGS, TAGGED = "user_artists.dat", "artists.dat", "tags.dat", "user_taggedartists-timestamps.dat"
FILES = (LISTENS, ARTISTS, TAGS, TAGGED)
TAGS_KEPT = 10
BEGINNING = 1_009_843_200  # 2002-01-01, when Last.fm began


def prepare(name: str, out: Path, source: Path | None, options: Mapping[str, Any]) -> Path:
    """Write the prepared folder from the network, a local archive or an unpacked folder."""
    if options:
        raise UserError(f"{name}: has no option {next(iter(options))!r}")

    def convert(files: tuple[Path, ...], scratch: Path) -> Dataset:
        root = files[0]
        if not root.is_dir():
            root = extract(root, scratch / "unpacked", wanted=lambda path: PurePosixPath(path).name in FILES)
        found = {file: _find(root, file) for file in FILES}
        tagged = _read(found[TAGGED], "utf-8", ("userID", "artistID", "tagID", "timestamp"))
        pq.write_table(_artists(found[ARTISTS], found[TAGS], tagged), scratch / "items.parquet")
        log = _listens(found[LISTENS]) if name == "lastfm-2k" else _tag_events(tagged)
        pq.write_table(log, scratch / "interactions.parquet")
        dataset = load_dataset(scratch / "interactions.parquet", name=name, duplicates="first")
        if name == "lastfm-2k":
            return dataset
        return replace(dataset, dropped={**dataset.dropped, "impossible_time": len(tagged) - len(log)})

    remote = Remote(URL, f"sha256:{SHA256}")
    return prepare_from(out, name, [remote], source, convert, wanted=lambda path: path.name in FILES)


def _find(root: Path, file: str) -> Path:
    for path in (root / file, *sorted(root.glob(f"*/{file}"))):
        if path.is_file():
            return path
    raise UserError(f"{root}: holds no {file}, which the data set has")


def _read(path: Path, encoding: str, columns: tuple[str, ...]) -> pa.Table:
    """Read a tab-separated file with a header; ids and numbers as int64, the rest as text."""
    texts = {name: pa.string() for name in ("name", "tagValue") if name in columns}
    numbers = {name: pa.int64() for name in columns if name not in texts}
    try:
        return pa_csv.read_csv(
            path,
            pa_csv.ReadOptions(encoding=encoding),
            pa_csv.ParseOptions(delimiter="\t", quote_char=False),
            pa_csv.ConvertOptions(column_types=texts | numbers, include_columns=list(columns)),
        )
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not as HetRec 2011 has it: {str(error).splitlines()[0]}") from error


def _listens(path: Path) -> pa.Table:
    table = _read(path, "utf-8", ("userID", "artistID", "weight"))
    return table.rename_columns(["user_id", "item_id", "rating"])


def _tag_events(tagged: pa.Table) -> pa.Table:
    seconds = tagged["timestamp"].to_numpy() / 1000.0
    table = tagged.select(["userID", "artistID"]).rename_columns(["user_id", "item_id"])
    return table.append_column("timestamp", pa.array(seconds)).filter(pa.array(seconds >= BEGINNING))


def _artists(artists: Path, tags: Path, tagged: pa.Table) -> pa.Table:
    """Return item_id, title and tags: the most given first, equally often given ones by tag number."""
    names = _read(tags, "latin-1", ("tagID", "tagValue"))
    value = dict(zip(names["tagID"].to_pylist(), names["tagValue"].to_pylist(), strict=True))
    given = tagged.group_by(["artistID", "tagID"]).aggregate([([], "count_all")])
    artist, tag, count = (given[column].to_numpy() for column in ("artistID", "tagID", "count_all"))
    lists: dict[int, list[str]] = {}
    for row in np.lexsort((tag, -count, artist)).tolist():
        kept = lists.setdefault(int(artist[row]), [])
        if len(kept) < TAGS_KEPT and int(tag[row]) in value:
            kept.append(value[int(tag[row])])
    table = _read(artists, "utf-8", ("id", "name")).rename_columns(["item_id", "title"])
    column = [lists.get(item, []) for item in table["item_id"].to_pylist()]
    return table.append_column("tags", pa.array(column, pa.list_(pa.string())))


ENTRIES = tuple(
    Entry(
        name=name,
        what=what,
        size=size,
        licence="Last.fm data for non-commercial use, as HetRec 2011 passes them on",
        citation=(
            "Iván Cantador, Peter Brusilovsky and Tsvi Kuflik (2011). 2nd Workshop on Information Heterogeneity and "
            "Fusion in Recommender Systems (HetRec 2011). RecSys 2011"
        ),
        url="https://grouplens.org/datasets/hetrec-2011/",
        prepare=partial(prepare, name),
    )
    for name, what, size in (
        ("lastfm-2k", "listening counts of artists, no times; names and tags", "92,834 pairs, 1,892 users; 2.6 MB"),
        ("lastfm-2k-tags", "first tag of an artist with its time; names and tags", "186,479 tag assignments; 2.6 MB"),
    )
)
