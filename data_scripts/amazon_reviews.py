"""Amazon product reviews of 2014 and 2018 from McAuley's group at UCSD: 5-core reviews and ratings only.

A data set is named with its category after a colon, ``amazon-2014-5core:Beauty``. The 5-core files are JSON lines, of
which user, item, rating and time are kept; the ratings files are CSV without a header, whose columns stand in another
order in 2018 (item, user) than in 2014 (user, item). ``metadata: true`` adds title, brand and categories of the items.

Some of the 2014 files are not JSON but Python literals, one a line; such a line is read with ``ast.literal_eval``,
which builds values and runs nothing, and no line may be longer than a mebibyte.

The publisher gives no checksums. The SHA-256 of the 2018 ratings are those that a public library (OmniRec) recorded
from the same addresses; every other file is recorded on first use.
"""

from __future__ import annotations

import ast
import gzip
import html
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from apps.recsys.data.dataset import Dataset, load_dataset
from data_scripts.amazon_categories import CATEGORIES, RATINGS_2018_SHA256
from data_scripts.entry import Entry, Remote, prepare_from
from data_scripts.names import nearest
from kdcore.config import UserError

BASE = {
    2014: "https://mcauleylab.ucsd.edu/public_datasets/data/amazon/categoryFiles/",
    2018: "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/",
}
MAX_LINE = 1 << 20
MAX_TITLE = 500  # some 2018 titles are pieces of web pages
EXPANSION_FLOOR, EXPANSION = 1 << 30, 200  # reviews compress about threefold
BATCH = 100_000
REVIEW_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.float64()), ("rating", pa.float32())]
)
ITEM_SCHEMA = pa.schema(
    [("item_id", pa.string()), ("title", pa.string()), ("brand", pa.string()), ("categories", pa.list_(pa.string()))]
)


class Family(NamedTuple):
    """A year of the collection and what is in a file: ``5core`` or ``ratings``."""

    year: int
    form: str

    @property
    def name(self) -> str:
        """The name in the catalogue."""
        return f"amazon-{self.year}-{self.form}"


def prepare(family: Family, out: Path, source: Path | None, options: Mapping[str, Any]) -> Path:
    """Write the prepared folder of a category; options: ``category``, and ``metadata`` for titles and categories."""
    for option in options:
        if option not in ("category", "metadata"):
            raise UserError(f"{family.name}: has no option {option!r}")
    category, metadata = options.get("category"), options.get("metadata", False)
    if category is None:
        raise UserError(f"{family.name}: wants a category, as in {family.name}:{CATEGORIES[family.year][-2]}")
    if category not in CATEGORIES[family.year]:
        raise UserError(f"{family.name}: no category {category!r}{nearest(category, CATEGORIES[family.year])}")
    if not isinstance(metadata, bool):
        raise UserError(f"{family.name}: metadata: got {metadata!r}, wanted true or false")
    name = f"{family.name}:{category}"

    def convert(files: tuple[Path, ...], scratch: Path) -> Dataset:
        log = files[0]
        if family.form == "5core":
            interactions = _write_reviews(log, scratch / "interactions.parquet")
        else:
            interactions = _write_ratings(log, family.year, scratch / "interactions.csv")
        if metadata:
            _write_items(files[1], scratch / "items.parquet")
        return load_dataset(interactions, name=name)

    remotes = [_log_file(family, category), *([_metadata_file(family, category)] if metadata else [])]
    return prepare_from(out, name, remotes, source, convert, options={"metadata": metadata})


def _log_file(family: Family, category: str) -> Remote:
    if family.year == 2014:
        return Remote(
            BASE[2014] + (f"reviews_{category}_5.json.gz" if family.form == "5core" else f"ratings_{category}.csv")
        )
    if family.form == "5core":
        return Remote(f"{BASE[2018]}categoryFilesSmall/{category}_5.json.gz")
    return Remote(f"{BASE[2018]}categoryFilesSmall/{category}.csv", f"sha256:{RATINGS_2018_SHA256[category]}")


def _metadata_file(family: Family, category: str) -> Remote:
    return Remote(BASE[family.year] + ("" if family.year == 2014 else "metaFiles2/") + f"meta_{category}.json.gz")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield line numbers and lines of a plain or gzip file; refuse a line or an expansion that is out of proportion."""
    with open(path, "rb") as handle:
        packed = handle.read(2) == b"\x1f\x8b"
    limit = max(EXPANSION_FLOOR, EXPANSION * path.stat().st_size)
    total = 0
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as stream:
            for number in itertools.count(1):
                line = stream.readline(MAX_LINE + 1)
                if not line:
                    return
                total += len(line)
                if len(line) > MAX_LINE:
                    raise UserError(f"{path}: row {number}: is longer than {MAX_LINE} bytes")
                if packed and total > limit:
                    raise UserError(f"{path}: expands to more than {limit} bytes, refused")
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged: {error}") from error


def read_record(line: bytes) -> dict[str, Any]:
    """Return the object in a line: JSON, or the Python literal of the looser files.

    Raises:
        ValueError: it is neither.
    """
    try:
        text = line.decode("utf-8").strip()
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = ast.literal_eval(text) if text.startswith("{") else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("is neither a JSON object nor a Python literal of one")
    return found


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            yield number, read_record(line)
        except ValueError as error:
            raise UserError(f"{path}: row {number}: {error}") from None


def _write_reviews(path: Path, target: Path) -> Path:
    """Write user, item, time and rating of the reviews, the texts left out."""

    def rows() -> Iterator[dict[str, Any]]:
        for number, record in _records(path):
            row: dict[str, Any] = {}
            for name, key in (("user_id", "reviewerID"), ("item_id", "asin")):
                value = record.get(key)
                if not isinstance(value, str) or not value:
                    raise UserError(f"{path}: row {number}, column {key}: is missing or not text")
                row[name] = value
            for name, key in (("timestamp", "unixReviewTime"), ("rating", "overall")):
                value = record.get(key)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise UserError(f"{path}: row {number}, column {key}: is missing or not a number")
                row[name] = float(value)
            yield row

    return _write_batches(rows(), REVIEW_SCHEMA, target)


def _write_ratings(path: Path, year: int, target: Path) -> Path:
    """Write the ratings with the header that they lack."""
    names = ("user_id", "item_id") if year == 2014 else ("item_id", "user_id")
    with open(target, "wb") as sink:
        sink.write(f"{','.join(names)},rating,timestamp\n".encode())
        lines = _lines(path)
        first = list(itertools.islice(lines, 200))
        _check_order(path, first, names.index("item_id"))
        for _, line in itertools.chain(first, lines):
            sink.write(line)
    return target


def _check_order(path: Path, lines: list[tuple[int, bytes]], position: int) -> None:
    """Refuse a file of the other year: product numbers have ten characters, user numbers nearly always more."""
    fields = [line.split(b",") for _, line in lines]
    if any(len(row) != 4 for row in fields):
        raise UserError(f"{path}: row {next(n for n, line in lines if line.count(b',') != 3)}: wanted four fields")
    ten = [sum(len(row[column]) == 10 for row in fields) for column in (0, 1)]
    if ten[position] < ten[1 - position]:
        order = "user, item" if position == 1 else "item, user"
        raise UserError(f"{path}: the columns are not {order}, rating, time: is this a file of the other year?")


def _write_items(path: Path, target: Path) -> Path:
    """Write title, brand and categories of the products, the first entry of each."""

    def rows() -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        for number, record in _records(path):
            item = record.get("asin")
            if not isinstance(item, str) or not item:
                raise UserError(f"{path}: row {number}, column asin: is missing or not text")
            if item not in seen:
                seen.add(item)
                yield {
                    "item_id": item,
                    "title": _text(record.get("title")),
                    "brand": _text(record.get("brand")),
                    "categories": _categories(record.get("categories", record.get("category"))),
                }

    return _write_batches(rows(), ITEM_SCHEMA, target)


def _text(value: object) -> str | None:
    """Return a short text without character references, None for anything else."""
    text = html.unescape(value).strip() if isinstance(value, str) else ""
    return text if 0 < len(text) <= MAX_TITLE else None


def _categories(value: object) -> list[str]:
    """Return the names in a list (2018) or a list of paths (2014), each once, in order."""
    names: dict[str, None] = {}
    for each in value if isinstance(value, list) else []:
        for name in each if isinstance(each, list) else [each]:
            text = _text(name)
            if text is not None:
                names[text] = None
    return list(names)


def _write_batches(rows: Iterable[dict[str, Any]], schema: pa.Schema, target: Path) -> Path:
    rows = iter(rows)
    with pq.ParquetWriter(target, schema) as writer:
        while batch := list(itertools.islice(rows, BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    return target


ENTRIES = tuple(
    Entry(
        name=family.name,
        what=f"Amazon reviews of {family.year}, {what}; name a category, {family.name}:{CATEGORIES[family.year][-2]}",
        size=size,
        licence="no licence stated; collected from Amazon for research",
        citation=citation,
        url=url,
        prepare=partial(prepare, family),
    )
    for year, url, citation in (
        (
            2014,
            "https://mcauleylab.ucsd.edu/public_datasets/data/amazon/index_2014.html",
            "Ruining He and Julian McAuley (2016). Ups and Downs: Modeling the Visual Evolution of Fashion Trends with "
            "One-Class Collaborative Filtering. WWW 2016",
        ),
        (
            2018,
            "https://nijianmo.github.io/amazon/",
            "Jianmo Ni, Jiacheng Li and Julian McAuley (2019). Justifying Recommendations using Distantly-Labeled "
            "Reviews and Fine-Grained Aspects. EMNLP 2019",
        ),
    )
    for family, what, size in (
        (
            Family(year, "5core"),
            "users and items with five reviews or more",
            {2014: "10 thousand to 9 million reviews", 2018: "3 thousand to 27 million reviews"}[year],
        ),
        (
            Family(year, "ratings"),
            "all ratings",
            {2014: "500 thousand to 23 million ratings", 2018: "90 thousand to 51 million ratings"}[year],
        ),
    )
)
