"""Laws of the readers: any bytes give a data set or a ``UserError``; any ids survive; both paths read the same."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from apps.recsys.data.dataset import load_dataset
from apps.recsys.data.formats import text, values
from apps.recsys.data.formats.text import Block, Field, Layout, Tally
from apps.recsys.data.store import write_canonical
from kdcore.config import UserError

HEADERS = {
    "x.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n",
    "x.csv": b"user_id,item_id,rating,timestamp\n",
    "ratings.csv": b"userId,movieId,rating,timestamp\n",
    "u.data": b"",
    "ratings.dat": b"",
    "x.txt": b"",
    "x.jsonl": b'{"user_id": "a", "item_id": 1}\n',
    "x": b"",
}
PIECES = [b'"', b"\n", b"\r\n", b"\r", b"\0", b"\xff", b",", b"\t", b"::", b"nan", b"1e999", b"null", b"{}", b"1", b" "]
PIECES += [b"1,2,3,4\n", b"1\t2\t3\t4\n", b"1::2::3::4\n", b'"a\nb",2,3,4\n', b"\x1f", b"\xed\xa0\x80", b"[[", b"-"]
PIECES += [
    b'{"user_id": "b", "item_id": 2}\n',
    b'{"user_id": "b", "item_id": ',
    b'"\\ud800"',
    b"2020-01-01",
    b"\xe2\x80\xa8",
]
junk = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(PIECES), max_size=25).map(b"".join))


@contextmanager
def blocks_of(size: int, longest: int = 1 << 24) -> Iterator[None]:
    before = text.BLOCK_BYTES, text.MAX_RECORD_BYTES
    text.BLOCK_BYTES, text.MAX_RECORD_BYTES = size, longest
    try:
        yield
    finally:
        text.BLOCK_BYTES, text.MAX_RECORD_BYTES = before


def loads_or_explains(name: str, data: bytes, skip_bad: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            dataset = load_dataset(path, skip_bad=skip_bad)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            assert name in str(error)
        else:
            assert len(dataset) > 0
            assert all(each != "" for each in dataset.user_ids.to_pylist() + dataset.item_ids.to_pylist())
            assert dataset.fingerprint


@settings(max_examples=250, deadline=None)
@given(
    name=st.sampled_from(sorted(HEADERS)),
    header=st.booleans(),
    data=junk,
    skip_bad=st.booleans(),
    packed=st.booleans(),
    size=st.sampled_from([5, 40, 1 << 24]),
    longest=st.sampled_from([50, 1 << 24]),
)
def test_any_bytes_give_a_data_set_or_a_user_error(
    name: str, header: bool, data: bytes, skip_bad: bool, packed: bool, size: int, longest: int
) -> None:
    data = HEADERS[name] + data if header else data
    with blocks_of(size, longest):
        loads_or_explains(f"{name}.gz" if packed else name, gzip.compress(data) if packed else data, skip_bad)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300), skip_bad=st.booleans(), name=st.sampled_from(["x.parquet", "x.csv.gz"]))
def test_any_bytes_as_a_binary_file(data: bytes, skip_bad: bool, name: str) -> None:
    loads_or_explains(name, data, skip_bad)


ids = st.text(min_size=1, max_size=6)  # any code points but surrogates


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.tuples(ids, ids), min_size=1, max_size=12),
    kind=st.sampled_from(["csv", "jsonl", "parquet"]),
    size=st.sampled_from([3, 1 << 24]),
)
def test_any_unicode_ids_survive_reading_and_storing(rows: list[tuple[str, str]], kind: str, size: int) -> None:
    if kind == "csv":
        assume(not any("\0" in each for row in rows for each in row))  # NUL is taken for a binary file
    with tempfile.TemporaryDirectory() as folder, blocks_of(size):
        path = Path(folder) / f"x.{kind}"
        if kind == "csv":
            buffer = io.StringIO()
            writer = csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerows([("user_id", "item_id"), *rows])
            path.write_text(buffer.getvalue(), encoding="utf-8", newline="")
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"user_id": u, "item_id": i}) + "\n" for u, i in rows))
        else:
            pq.write_table(pa.table({"user_id": [u for u, _ in rows], "item_id": [i for _, i in rows]}), path)
        dataset = load_dataset(path)
        users, items = dataset.user_ids.to_pylist(), dataset.item_ids.to_pylist()
        got = [(str(users[u]), str(items[i])) for u, i in zip(dataset.user, dataset.item, strict=True)]
        assert got == rows
        assert users == list(dict.fromkeys(users)) and dataset.user[0] == dataset.item[0] == 0
        stored = load_dataset(write_canonical(dataset, Path(folder) / "stored"))
        assert stored.fingerprint == dataset.fingerprint
        assert stored.user_ids.equals(dataset.user_ids) and stored.item_ids.equals(dataset.item_ids)


FIELDS = [
    Field("user_id", 0, values.ID, "user"),
    Field("rating", 1, values.RATING, "rating"),
    Field("timestamp", 2, values.TIME, "time"),
    Field("tags", 3, values.WORDS, "tags"),
    Field("genres", 4, values.GENRES, "genres"),
    Field("price", 5, values.MAYBE_NUMBER, "price"),
    Field("vector", 6, values.NUMBERS, "vector"),
    Field("title", 7, values.TEXT, "title"),
]
SAMPLES = [
    ["a", "é", '"q"', 'a"b', '"a""b"', '"a,b"', " ", "NA", "null", ""],
    ["1", "1.5", "-2e3", "inf", "nan", "", " 5", "+5", "1e400", "0x10", "1_0", ".5", "5.", "٣", "3.4028236e38"],
    ["5", "2020-01-01", "2020-01-01 10:00:00.123", "2020-01-01T10:00Z", "2020-01-01T10:00:00+02:00", "20200101", "x"],
    ["a b", "", " a", "a  b", "a\x0bb", "\u3000 a"],
    ["A|B", "", "(no genres listed)", "A||B", "|"],
    ["", "1", "nan", "x"],
    ["1 2", "", "1", "x", "1  2"],
    ["", "t", '"t"', "NULL"],
]
PLAIN = ["u", "3", "7", "a", "A", "1", "1", "t"]


@settings(max_examples=300, deadline=None)
@given(
    fields=st.tuples(*(st.sampled_from([plain, plain, *odd]) for plain, odd in zip(PLAIN, SAMPLES, strict=True))),
    quoting=st.booleans(),
)
def test_the_fast_path_accepts_no_more_and_reads_the_same(fields: tuple[str, ...], quoting: bool) -> None:
    layout = Layout("," if quoting else "\t", quoting)
    data = (layout.separator.join(fields) + "\n").encode()
    try:
        fast = text._read_fast(data, layout, FIELDS, len(FIELDS))
    except (pa.ArrowException, values.OddBlock):
        return
    slow, bad = text._read_slowly(Path("x"), Block(1, data), layout, FIELDS, len(FIELDS), False)
    assert bad == 0
    for name, column in fast.items():
        assert column.type.equals(slow[name].type)
        assert column.to_pylist() == slow[name].to_pylist()


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["a", "b\nc", 'd"e', "f,g", "h\r\ni"]), st.sampled_from(["1", "2", "bad"])),
        min_size=1,
        max_size=12,
    ),
    size=st.integers(3, 60),
)
def test_rows_and_line_numbers_do_not_depend_on_the_blocks(rows: list[tuple[str, str]], size: int) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([("user", "rating"), *rows])
    content = buffer.getvalue().encode()
    fields = [Field("user_id", 0, values.ID, "user"), Field("rating", 1, values.RATING, "rating")]
    with tempfile.TemporaryDirectory() as folder, blocks_of(size):
        path = Path(folder) / "x.csv"
        path.write_bytes(content)
        layout, tally = Layout(",", quoting=True), Tally()
        read = list(text.read_columns(path, layout, fields, width=2, header=True, skip_bad=True, tally=tally))
        got = [each for block in read for each in block["user_id"].to_pylist()]
        assert got == [user for user, rating in rows if rating != "bad"]
        assert tally.bad == sum(rating == "bad" for _, rating in rows)
        if tally.bad:
            first = next(at for at, (_, rating) in enumerate(rows) if rating == "bad")
            line = 2 + first + sum(user.count("\n") for user, _ in rows[:first])
            with pytest.raises(UserError, match=rf"x\.csv: row {line}, column rating"):
                list(text.read_columns(path, layout, fields, width=2, header=True, skip_bad=False, tally=Tally()))
