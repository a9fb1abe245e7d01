"""Every format gives the rows that are in the file, and says where a file is wrong."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apps.recsys.data.dataset import Dataset, load_dataset
from apps.recsys.data.formats import read_knowledge_graph, text
from kdcore.config import UserError

REAL = Path(os.environ.get("KD_DATA", "../shared/data")) / "recsys"
needs_data = pytest.mark.skipif(not (REAL / "ml-100k").is_dir(), reason="KD_DATA has no recsys/ml-100k")


def write(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def rows(dataset: Dataset) -> list[tuple[object, ...]]:
    users, items = dataset.user_ids.to_pylist(), dataset.item_ids.to_pylist()
    columns: list[list[object]] = [[users[u] for u in dataset.user], [items[i] for i in dataset.item]]
    if dataset.rating is not None:
        columns.append(dataset.rating.tolist())
    if dataset.has_timestamp:
        columns.append(dataset.timestamp.tolist())
    return list(zip(*columns, strict=True))


@needs_data
def test_ml_100k_atomic_files_against_a_plain_reading() -> None:
    dataset = load_dataset(REAL / "ml-100k")
    lines = (REAL / "ml-100k" / "ml-100k.inter").read_text().splitlines()[1:]
    expected = [tuple(float(field) for field in line.split("\t")) for line in lines]
    assert rows(dataset) == expected
    assert dataset.user_ids.type == pa.int64()
    assert dataset.user[0] == 0 and dataset.item[0] == 0 and dataset.user_ids[0].as_py() == 196
    assert dataset.item_features is not None and dataset.user_features is not None
    titles = {}
    for line in (REAL / "ml-100k" / "ml-100k.item").read_text().splitlines()[1:]:
        item, title, _, genres = line.split("\t")
        titles[int(item)] = (title or None, genres.split())
    for item, title, genres in zip(
        dataset.item_ids.to_pylist(),
        dataset.item_features["title"].to_pylist(),
        dataset.item_features["class"].to_pylist(),
        strict=True,
    ):
        assert titles[item] == (title, genres)
    assert dataset.user_features.num_rows == 943


@needs_data
def test_knowledge_graph_counts() -> None:
    triples, links = read_knowledge_graph(REAL / "ml-100k")
    assert triples.column_names == ["head_id", "relation_id", "tail_id"]
    assert triples.num_rows == 91_631 and len(set(triples["relation_id"].to_pylist())) == 24
    assert links.num_rows == 1_598
    with pytest.raises(UserError, match=r"expected one \*\.kg file, found 0"):
        read_knowledge_graph(REAL / "amazon-beauty")


@needs_data
def test_beauty_sequences_against_a_plain_reading() -> None:
    dataset = load_dataset(REAL / "amazon-beauty")
    lines = (REAL / "amazon-beauty" / "Beauty.txt").read_text().splitlines()
    expected = [(int(user), int(item)) for user, *items in map(str.split, lines) for item in items]
    assert rows(dataset) == expected
    assert not dataset.has_timestamp and dataset.timestamp.tolist() == list(range(198_502))
    attributes = json.loads((REAL / "amazon-beauty" / "Beauty_item2attributes.json").read_text())
    assert dataset.item_features is not None
    for item, names in zip(dataset.item_ids.to_pylist(), dataset.item_features["attributes"].to_pylist(), strict=True):
        assert names == [str(each) for each in attributes[str(item)]]


def test_movielens_100k(tmp_path: Path) -> None:
    write(tmp_path / "u.data", "1\t10\t3\t881250949\n2\t11\t4\t881250950\n")
    flags = ["0"] * 19
    flags[1] = flags[18] = "1"
    item = "|".join(["11", "Misérables, Les (1995)", "01-Jan-1995", "", "http://x", *flags])
    write(tmp_path / "u.item", item + "\n", "latin-1")
    write(tmp_path / "u.user", "1|24|M|technician|85711\n2|53|F|other|94043\n")
    dataset = load_dataset(tmp_path)
    assert rows(dataset) == [(1, 10, 3.0, 881250949.0), (2, 11, 4.0, 881250950.0)]
    assert dataset.item_features is not None and dataset.user_features is not None
    assert dataset.item_features.to_pylist() == [
        {"title": None, "release_date": None, "genres": None},
        {"title": "Misérables, Les (1995)", "release_date": "01-Jan-1995", "genres": ["Action", "Western"]},
    ]
    assert dataset.user_features["occupation"].to_pylist() == ["technician", "other"]


def test_movielens_1m(tmp_path: Path) -> None:
    write(tmp_path / "ratings.dat", "1::1193::5::978300760\r\n2::661::3.5::978302109\r\n")
    write(tmp_path / "movies.dat", "1193::Café: One::Drama|War\n661::Two::Musical\n", "latin-1")
    write(tmp_path / "users.dat", "1::F::1::10::48067\n2::M::56::16::70072\n")
    dataset = load_dataset(tmp_path)
    assert rows(dataset) == [(1, 1193, 5.0, 978300760.0), (2, 661, 3.5, 978302109.0)]
    assert dataset.item_features is not None and dataset.user_features is not None
    assert dataset.item_features.to_pylist() == [
        {"title": "Café: One", "genres": ["Drama", "War"]},
        {"title": "Two", "genres": ["Musical"]},
    ]
    assert dataset.user_features["gender"].to_pylist() == ["F", "M"]


def test_movielens_20m_in_a_folder_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "ml-20m" / "ml-20m"
    write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,3.5,1112484676\n")
    write(folder / "tags.csv", "userId,movieId,tag,timestamp\n")
    write(folder / "movies.csv", 'movieId,title,genres\n2,"One, The ""A""",X|Y\n29,Two,(no genres listed)\n')
    dataset = load_dataset(tmp_path / "ml-20m")
    assert rows(dataset) == [(1, 2, 3.5, 1112486027.0), (1, 29, 3.5, 1112484676.0)]
    assert dataset.item_features is not None
    assert dataset.item_features.to_pylist() == [
        {"title": 'One, The "A"', "genres": ["X", "Y"]},
        {"title": "Two", "genres": []},
    ]


def test_atomic_types(tmp_path: Path) -> None:
    write(tmp_path / "x.inter", "user_id:token\titem_id:token\trating:float\n007\t1\t2\n8\t2\t\n")
    write(
        tmp_path / "x.item", "item_id:token\tprice:float\ttags:token_seq\tvec:float_seq\n2\t1.5\ta  b\t1 2.5\n1\t\t\t\n"
    )
    with pytest.raises(UserError, match=r"x\.inter: row 3, column rating: is empty"):
        load_dataset(tmp_path)
    dataset = load_dataset(tmp_path / "x.inter", skip_bad=True)
    assert dataset.user_ids.to_pylist() == ["007"]  # not an integer the plain way: stays text
    assert dataset.item_features is not None
    assert dataset.item_features.to_pylist() == [{"price": None, "tags": [], "vec": []}]


def test_csv_with_a_column_mapping_quotes_and_iso_times(tmp_path: Path) -> None:
    content = (
        "\ufeffwho;what;note;when\r\n"
        '"a;""x""";p;"two\r\nlines";2020-01-01T00:00:10Z\r\n'
        "b;q;;2020-01-01T01:00:00+01:00\r\n"
        "\r\n"
        "b;q;;1577836800.5\r\n"
    )
    write(tmp_path / "log.csv", content)
    with pytest.raises(UserError, match=r"row 1, column user_id: is missing; the file has who, what, note, when"):
        load_dataset(tmp_path / "log.csv")
    dataset = load_dataset(
        tmp_path / "log.csv", columns={"user_id": "who", "item_id": "what", "timestamp": "when"}, name="mine"
    )
    assert rows(dataset) == [('a;"x"', "p", 1577836810.0), ("b", "q", 1577836800.0), ("b", "q", 1577836800.5)]
    assert dataset.name == "mine"


def test_iso_times_without_a_zone_are_utc_on_both_paths(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "user,item,time\n1,2,2020-01-01\n1,3,2020-01-01 00:00:01.25\n")
    assert load_dataset(path).timestamp.tolist() == [1577836800.0, 1577836801.25]
    path = write(tmp_path / "b.csv", "user,item,time\n1,2,2020-01-01\n1,3,2020-01-01T00:00:01Z\n")
    assert load_dataset(path).timestamp.tolist() == [1577836800.0, 1577836801.0]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([7, 8, 7], pa.int64()), pa.int64()),
        (pa.array([7, 8, 7], pa.uint8()), pa.int64()),
        (pa.array(["7", "é\n", "7"]), pa.string()),
        (pa.array(["7", "8", "7"]), pa.string()),
        (pa.array(["7", "8", "7"], pa.large_string()), pa.string()),
        (pa.array(["7", "8", "7"]).dictionary_encode(), pa.string()),
    ],
)
def test_parquet_keeps_the_type_of_ids(tmp_path: Path, ids: pa.Array, expected: pa.DataType) -> None:
    times = pa.array([0, 10**6, 2 * 10**6], pa.timestamp("us"))
    pq.write_table(pa.table({"user_id": ids, "item_id": [1, 2, 3], "timestamp": times}), tmp_path / "x.parquet")
    dataset = load_dataset(tmp_path / "x.parquet")
    assert dataset.user_ids.type == expected
    assert [dataset.user_ids[u].as_py() for u in dataset.user] == ids.to_pylist()
    assert dataset.timestamp.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("user_id", pa.array(["a", "", "c"]), "row 2, column user_id: is empty"),
        ("item_id", pa.array([1, None, 3]), "row 2, column item_id: is empty"),
        ("user_id", pa.array([1.0, 2.0, 3.0]), "column user_id: has type double; ids must be text or integers"),
        ("rating", pa.array([1.0, 2.0, float("nan")]), "row 3, column rating: 'nan' is not a finite number"),
        ("rating", pa.array([1.0, float("inf"), 1.0]), "row 2, column rating: 'inf' is not a finite number"),
        ("rating", pa.array(["1", "2", "3"]), "column rating: has type string, expected numbers"),
        ("timestamp", pa.array([None, 1, 2], pa.timestamp("s")), "row 1, column timestamp: is empty"),
        ("timestamp", pa.array(["5", "x", "2020-01-01"]), "row 2, column timestamp: is neither seconds nor"),
    ],
)
def test_bad_parquet_values(tmp_path: Path, column: str, values: pa.Array, problem: str) -> None:
    table = {"user_id": [1, 2, 3], "item_id": [1, 2, 3], "rating": [1.0, 2.0, 3.0], "timestamp": [1, 2, 3]}
    pq.write_table(pa.table({**table, column: values}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: " + problem):
        load_dataset(tmp_path / "x.parquet")
    if problem.startswith("row"):
        dataset = load_dataset(tmp_path / "x.parquet", skip_bad=True)
        assert (len(dataset), dataset.dropped["bad"]) == (2, 1)


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        {"user": "é", "item": 5, "time": "2020-01-01", "rating": 3, "more": [None, {"a": 1}]},
        {"item": 6, "user": "b", "time": "2020-01-02T00:00:00", "rating": 2.5},
    ]
    path = write(tmp_path / "x.jsonl", "\n".join(json.dumps(line) for line in lines))
    expected = [("é", 5, 3.0, 1577836800.0), ("b", 6, 2.5, 1577923200.0)]
    assert rows(load_dataset(path)) == expected
    write(path, path.read_bytes().replace(b"\n", b"\n\n  \n"))
    assert rows(load_dataset(path)) == expected


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("null", "is not a JSON object"),
        ("[1]", "is not a JSON object"),
        ('{"user_id": "a"', "is not JSON"),
        ('{"user_id": 1, "item_id": 1, "rating": 1}', "column user_id: '1' is not text, as in the first row"),
        ('{"user_id": "", "item_id": 1, "rating": 1}', "column user_id: is missing or empty"),
        ('{"user_id": "a", "item_id": true, "rating": 1}', "column item_id: 'True' is not an integer"),
        ('{"user_id": "a", "item_id": 1}', "column rating: is missing or empty"),
        ('{"user_id": "a", "item_id": 1, "rating": NaN}', "column rating: nan is not a finite number"),
        ('{"user_id": "a", "item_id": 1, "rating": 1e99}', "column rating: 1e\\+99 is not a finite number"),
        ('{"user_id": "\\ud800", "item_id": 1, "rating": 1}', "column user_id: is not valid Unicode"),
        ('{"user_id": "a", "item_id": 99999999999999999999, "rating": 1}', "column item_id: is an integer beyond"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, problem: str) -> None:
    good = '{"user_id": "a", "item_id": 1, "rating": 1}\n'
    path = write(tmp_path / "x.jsonl", good + "\n" + line + "\n" + good)
    with pytest.raises(UserError, match=r"x\.jsonl: row 3.*" + problem):
        load_dataset(path)
    dataset = load_dataset(path, skip_bad=True)
    assert (len(dataset), dataset.dropped["bad"]) == (2, 1)
    write(path, line + "\n" + good)  # as the very first line it decides nothing
    assert len(load_dataset(path, skip_bad=True)) in (1, 2)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1,2,nan,5", "row 4, column rating: 'nan' is not a finite number"),
        ("1,2,inf,5", "row 4, column rating: 'inf' is not a finite number"),
        ("1,2,1e39,5", "row 4, column rating: '1e39' is beyond the range of a rating"),
        ("1,2,,5", "row 4, column rating: is empty"),
        ("1,2,3,yesterday", "row 4, column timestamp: 'yesterday' is neither seconds nor an ISO 8601 time"),
        ("1,2,3,2020-02-30", "row 4, column timestamp: '2020-02-30' is neither"),
        ("1,2,3,inf", "row 4, column timestamp: 'inf' is not a finite number"),
        (",2,3,4", "row 4, column user: is empty"),
        ("1,,3,4", "row 4, column item: is empty"),
        ("1,2,3", "row 4: has 3 fields, expected 4"),
        ("1,2,3,4,5", "row 4: has 5 fields, expected 4"),
        ('1,"2,3,4', "row 4: has a quoted field that does not end"),
        ("\xff\xfe,2,3,4", "row 4, column user: is not UTF-8 text"),
        ("a\0b,2,3,4", "row 4, column user: holds a NUL byte"),
        ("1,2\r3,4", "row 4: has 3 fields, expected 4"),
    ],
)
def test_bad_csv_rows_are_named_or_dropped(tmp_path: Path, line: str, problem: str) -> None:
    good = ["1,2,3,4", '"a\nb",2,3,4', "5,6,3,4"]
    # the record with a line break takes the lines 2 and 3
    content = "\n".join(["user,item,rating,timestamp", good[1], line, good[0], good[2], ""])
    path = write(tmp_path / "x.csv", content.encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.csv: " + problem) as caught:
        load_dataset(path)
    assert "\n" not in str(caught.value)
    dataset = load_dataset(path, skip_bad=True)
    assert dataset.dropped["bad"] == 1
    assert rows(dataset) == [("a\nb", 2, 3.0, 4.0), ("1", 2, 3.0, 4.0), ("5", 6, 3.0, 4.0)]


def test_two_stray_quotes_do_not_swallow_the_rows_between(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'user,item\n1,2\n3,"4\n5,6\n7,"8\n9,10\n')
    with pytest.raises(UserError, match=r"row 3: has a quoted field that does not end"):
        load_dataset(path)
    dataset = load_dataset(path, skip_bad=True)
    assert rows(dataset) == [(1, 2), (5, 6), (9, 10)]
    assert dataset.dropped["bad"] == 2


@pytest.mark.parametrize("where", [0, 123_456, 199_999])
def test_one_bad_line_among_very_many(tmp_path: Path, where: int) -> None:
    lines = [f"u{n % 1000},{n % 777},{n % 5},{n}" for n in range(200_000)]
    lines[where] = "u1,2,bad,4"
    path = write(tmp_path / "x.csv", "user_id,item_id,rating,timestamp\n" + "\n".join(lines))
    old, text.BLOCK_BYTES = text.BLOCK_BYTES, 1 << 18
    try:
        with pytest.raises(UserError, match=rf"x\.csv: row {where + 2}, column rating: 'bad' is not a number"):
            load_dataset(path)
        dataset = load_dataset(path, skip_bad=True)
    finally:
        text.BLOCK_BYTES = old
    assert len(dataset) == 199_999 and dataset.dropped["bad"] == 1
    kept = [n for n in range(200_000) if n != where]
    assert np.array_equal(dataset.timestamp, np.array(kept, dtype=float))
    assert [dataset.user_ids[u].as_py() for u in dataset.user[:3]] == [f"u{n % 1000}" for n in kept[:3]]


def test_gzip(tmp_path: Path) -> None:
    content = b"user,item\n1,2\n3,4\n"
    write(tmp_path / "x.csv.gz", gzip.compress(content))
    assert rows(load_dataset(tmp_path / "x.csv.gz")) == [(1, 2), (3, 4)]
    write(tmp_path / "x.csv.gz", gzip.compress(content)[:-9])
    with pytest.raises(UserError, match="not a whole gzip file"):
        load_dataset(tmp_path / "x.csv.gz")
    write(tmp_path / "x.csv.gz", content)
    with pytest.raises(UserError, match="not a whole gzip file"):
        load_dataset(tmp_path / "x.csv.gz")


def test_a_gzip_that_expands_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_BOMB_BYTES", 1 << 16)
    monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 14)
    path = write(tmp_path / "x.csv.gz", gzip.compress(b"user,item\n" + b"1,2\n" * 500_000))
    with pytest.raises(UserError, match="expands more than 200 times"):
        load_dataset(path)


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_RECORD_BYTES", 1 << 10)
    monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 9)
    path = write(tmp_path / "x.txt", b"1 2\n" + b"1" * 5000)
    with pytest.raises(UserError, match=r"row 2: is longer than"):
        load_dataset(path)


def test_sequences_name_the_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "s.txt", b"u1 a b\n\nu2\nu3 \xc3\xa9\n")
    with pytest.raises(UserError, match=r"s\.txt: row 3: user 'u2' has no items"):
        load_dataset(path)
    dataset = load_dataset(path, skip_bad=True)
    assert rows(dataset) == [("u1", "a"), ("u1", "b"), ("u3", "é")]
    write(path, b"u1 a b\nu2 \xff\n")
    with pytest.raises(UserError, match=r"s\.txt: row 2: is not UTF-8 text"):
        load_dataset(path)


def test_item_attributes_must_be_lists(tmp_path: Path) -> None:
    write(tmp_path / "s.txt", "1 2 3\n")
    write(tmp_path / "s_item2attributes.json", '{"2": 5}')
    with pytest.raises(UserError, match="item '2': expected a list of attribute ids"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.inter", "user_id\titem_id\n1\t2\n", "row 1, column 'user_id': expected name:type"),
        ("x.inter", "user_id:token\tfoo:token\n1\t2\n", "row 1, column item_id: is missing; the file has user_id, foo"),
        ("x.inter", "user_id:token\titem_id:token\n", "holds no interactions"),
        ("x.csv", "", "row 1: is empty; a header"),
        ("x.csv", b"\xff\xfeu\0", "is UTF-16 text"),
        ("x.csv", bytes(range(128, 256)), "row 1: is not UTF-8 text"),
        ("x.csv", "user,user,item\n1,2,3\n", "row 1, column user: stands in the header twice"),
        ("x.parquet", b"PAR1nonsense", "not readable as Parquet"),
        ("x.bin", b"\x01\x02", "the format is not known; accepted: RecBole .inter"),
        ("x.parquet.gz", b"\x01\x02", "Parquet has its own compression"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path: Path, name: str, content: str | bytes, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_dataset(write(tmp_path / name, content))


def test_the_format_is_told_by_content_where_the_name_does_not(tmp_path: Path) -> None:
    write(tmp_path / "a", "1::2::3::4\n")
    write(tmp_path / "b", "1\t2\t3\t4\n")
    write(tmp_path / "c", "user_id:token\titem_id:token\n1\t2\n")
    assert rows(load_dataset(tmp_path / "a")) == rows(load_dataset(tmp_path / "b")) == [(1, 2, 3.0, 4.0)]
    assert rows(load_dataset(tmp_path / "c")) == [(1, 2)]


def test_folders_that_do_not_say_what_is_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_dataset(tmp_path / "none")
    write(tmp_path / "README.txt", "hello world\n")
    with pytest.raises(UserError, match=r"no interactions in a known format \(found README.txt\); accepted"):
        load_dataset(tmp_path)
    write(tmp_path / "a.csv", "user,item\n1,2\n")
    write(tmp_path / "b.csv", "user,item\n1,2\n")
    with pytest.raises(UserError, match=r"holds several logs \(a\.csv, b\.csv\)"):
        load_dataset(tmp_path)


def test_column_mappings_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user,item\n1,2\n")
    with pytest.raises(UserError, match="unknown name 'userid', wanted some of user_id"):
        load_dataset(path, columns={"userid": "user"})
    with pytest.raises(UserError, match="column when: is missing"):
        load_dataset(path, columns={"timestamp": "when"})
    path = write(tmp_path / "u.data", "1\t2\t3\t4\n")
    with pytest.raises(UserError, match="fixed columns"):
        load_dataset(path, columns={"user_id": "user"})


def test_features_of_a_twice_named_item_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.inter", "user_id:token\titem_id:token\n1\t2\n")
    write(tmp_path / "x.item", "item_id:token\ttitle:token\n2\ta\n2\tb\n")
    with pytest.raises(UserError, match=r"x\.item: column item_id: 2 stands there twice|'2' stands there twice"):
        load_dataset(tmp_path)
