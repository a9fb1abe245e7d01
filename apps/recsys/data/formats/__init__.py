"""Formats on disk: which one a path holds, and a reader for each that gives a ``RawLog``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from apps.recsys.data.formats import atomic, movielens, sequences, tables
from apps.recsys.data.formats.atomic import read_knowledge_graph
from apps.recsys.data.formats.log import FeatureTable, LogBuilder, RawLog, align
from apps.recsys.data.formats.text import Layout, read_header
from kdcore.config import UserError

__all__ = [
    "ACCEPTED",
    "FeatureTable",
    "LogBuilder",
    "RawLog",
    "align",
    "find_log",
    "read_knowledge_graph",
    "read_log",
]

ACCEPTED = (
    "RecBole .inter, MovieLens u.data / ratings.dat / ratings.csv, sequences in .txt (user item item ...), "
    ".csv / .tsv / .parquet / .jsonl, text also as .gz, or a folder with one of them"
)
_BY_NAME = ("u.data", "ratings.dat", "ratings.csv")
_NO_DATA = re.compile(r"(readme|license|licence|source|changelog|notice|checksums)", re.IGNORECASE)
_FEATURE_FILES = {"users.parquet", "items.parquet", "movies.csv", "tags.csv", "links.csv"}
_FEATURE_FILES |= {"genome-scores.csv", "genome-tags.csv"}


def find_log(path: Path) -> Path:
    """Return the file with the interactions: the path itself, or the one in the folder that is meant.

    Raises ``UserError`` if there is none or more than one, saying what was looked for.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
    for pattern in (r".*\.inter", *map(re.escape, _BY_NAME), r"interactions\.(csv|tsv|parquet|jsonl|ndjson)"):
        found = [each for each in files if re.fullmatch(pattern + r"(\.gz)?", each.name)]
        if found:
            return _the_one(path, found)
    for pattern in (r".*\.(csv|tsv|parquet|jsonl|ndjson)", r".*\.txt"):
        found = [each for each in files if re.fullmatch(pattern + r"(\.gz)?", each.name)]
        found = [each for each in found if each.name not in _FEATURE_FILES and not _NO_DATA.match(each.name)]
        found = [each for each in found if not each.name.endswith("_sample.txt")]
        if found:
            return _the_one(path, found)
    folders = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    if len(folders) == 1 and not folders[0].is_symlink():  # an unpacked archive: ml-20m/ml-20m/ratings.csv
        return find_log(folders[0])
    names = ", ".join(each.name for each in files[:10]) or "nothing"
    raise UserError(f"{path}: holds no interactions in a known format (found {names}); accepted: {ACCEPTED}")


def _the_one(folder: Path, found: list[Path]) -> Path:
    if len(found) > 1:
        named = [each for each in found if each.name.split(".")[0] == folder.name]
        if len(named) != 1:
            names = ", ".join(each.name for each in found[:10])
            raise UserError(f"{folder}: holds several logs ({names}); give the path of one of them")
        found = named
    return found[0]


def read_log(file: Path, columns: Mapping[str, str], skip_bad: bool) -> RawLog:
    """Read a file of interactions in the format its name tells, else the one its first line tells."""
    unknown = sorted(set(columns) - set(tables.CANONICAL))
    if unknown:
        raise UserError(f"columns: unknown name {unknown[0]!r}, wanted some of {', '.join(tables.CANONICAL)}")
    name = file.name.removesuffix(".gz")
    suffix = Path(name).suffix.lower()
    mapped: dict[str, Callable[[Path, Mapping[str, str], bool], RawLog]] = {
        ".inter": atomic.read_interactions,
        ".csv": tables.read_csv,
        ".tsv": tables.read_csv,
        ".parquet": tables.read_parquet,
        ".jsonl": tables.read_json_lines,
        ".ndjson": tables.read_json_lines,
        ".json": tables.read_json_lines,
    }
    fixed: Mapping[str, Callable[[Path, bool], RawLog]] = {
        "u.data": movielens.read_100k,
        "ratings.dat": movielens.read_1m,
        "ratings.csv": movielens.read_20m,
    }
    if suffix == ".parquet" and file.suffix == ".gz":
        raise UserError(f"{file}: Parquet has its own compression; unpack the .gz first")
    if name == "ratings.csv" and (columns or not _is_movielens(file)):
        return tables.read_csv(file, columns, skip_bad)
    if name not in fixed and suffix in mapped:
        return mapped[suffix](file, columns, skip_bad)
    reader = fixed.get(name) or (sequences.read_interactions if suffix == ".txt" else _by_content(file))
    if reader is None:
        raise UserError(f"{file}: the format is not known; accepted: {ACCEPTED}")
    if columns:
        raise UserError(f"{file}: this format has fixed columns; a column mapping does not apply")
    return reader(file, skip_bad)


def _is_movielens(file: Path) -> bool:
    return {"userId", "movieId"} <= set(read_header(file, Layout(",", quoting=True)))


def _by_content(file: Path) -> Callable[[Path, bool], RawLog] | None:
    line = read_header(file, Layout("\n", encoding="latin-1"))[0]
    if re.search(r":(token|float)(_seq)?(\t|$)", line):
        return lambda path, skip_bad: atomic.read_interactions(path, {}, skip_bad)
    if line.count("::") == 3:
        return movielens.read_1m
    if re.fullmatch(r"[^\t]+\t[^\t]+\t[-+.\d]+\t\d+", line):
        return movielens.read_100k
    return None
