"""Preparing data sets end to end from archives in the publishers' layouts, made here."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from apps.recsys.data.dataset import Dataset, load_dataset
from data_scripts import amazon_reviews, catalogue, lastfm, movielens
from data_scripts.amazon_categories import CATEGORIES, RATINGS_2018_SHA256
from kdcore.config import UserError
from kdcore.run import read_json

# (user, item, rating, seconds) in file order
RATINGS = [(3, 50, 4, 881250949), (1, 7, 5, 881250950), (3, 7, 2, 881250951), (2, 50, 3, 881250900)]
TITLES = {50: "Star Wars (1977)", 7: "Café, le (1995)", 9: "Never Rated (2000)"}
GENRE_FLAGS = {50: [1, 15], 7: [8], 9: [5]}  # in the order of u.genre: Action, Sci-Fi; Drama; Comedy
GENRES = {50: ["Action", "Sci-Fi"], 7: ["Drama"], 9: ["Comedy"]}


def files_100k() -> dict[str, bytes]:
    def flags(item: int) -> str:
        return "|".join("1" if position in GENRE_FLAGS[item] else "0" for position in range(19))

    items = "".join(f"{item}|{title}|01-Jan-1977||http://x|{flags(item)}\n" for item, title in TITLES.items())
    return {
        "ml-100k/u.data": "".join("\t".join(map(str, row)) + "\n" for row in RATINGS).encode(),
        "ml-100k/u.item": items.encode("latin-1"),
        "ml-100k/u.user": b"".join(b"%d|24|M|technician|85711\n" % user for user in (1, 2, 3)),
        "ml-100k/u1.base": b"not read",
        "ml-100k/README": b"not read",
    }


def files_1m() -> dict[str, bytes]:
    items = "".join(f"{item}::{title}::{'|'.join(GENRES[item])}\n" for item, title in TITLES.items())
    return {
        "ml-1m/ratings.dat": "".join("::".join(map(str, row)) + "\n" for row in RATINGS).encode(),
        "ml-1m/movies.dat": items.encode("latin-1"),
        "ml-1m/users.dat": b"".join(b"%d::F::1::10::48067\n" % user for user in (1, 2, 3)),
    }


def files_20m(name: str) -> dict[str, bytes]:
    items = "".join(f'{item},"{title}",{"|".join(GENRES[item])}\n' for item, title in TITLES.items())
    ratings = "".join(",".join(map(str, row)) + "\n" for row in RATINGS)
    return {
        f"{name}/ratings.csv": f"userId,movieId,rating,timestamp\n{ratings}".encode(),
        f"{name}/movies.csv": f"movieId,title,genres\n{items}".encode(),
        f"{name}/genome-scores.csv": b"movieId,tagId,relevance\n1,1,0.5\n",
    }


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def rows_of(dataset: Dataset) -> list[tuple]:
    columns = [
        [dataset.user_ids[u].as_py() for u in dataset.user],
        [dataset.item_ids[i].as_py() for i in dataset.item],
        [None] * len(dataset) if dataset.rating is None else dataset.rating.tolist(),
        dataset.timestamp.tolist() if dataset.has_timestamp else [None] * len(dataset),
    ]
    return list(zip(*columns, strict=True))


def feature(dataset: Dataset, name: str) -> dict:
    table = dataset.item_features
    assert table is not None
    return dict(zip(dataset.item_ids.to_pylist(), table[name].to_pylist(), strict=True))


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("name", list(movielens.RELEASES))
def test_movielens(tmp_path: Path, name: str, unpacked: bool) -> None:
    files = {"ml-100k": files_100k, "ml-1m": files_1m}.get(name, lambda: files_20m(name))()
    source = write_folder(tmp_path / "mine", files) if unpacked else write_archive(tmp_path / "mine.zip", files)
    out = catalogue.prepare(name, tmp_path / "out", source=source)
    dataset = load_dataset(out)
    assert rows_of(dataset) == RATINGS
    assert feature(dataset, "title") == {item: TITLES[item] for item in (50, 7)}
    assert feature(dataset, "genres") == {item: GENRES[item] for item in (50, 7)}
    about = read_json(out / "dataset.json")
    assert (about["name"], about["simulated"], dataset.name) == (name, False, name)
    assert {each["verified"] for each in about["provenance"]} == {"local copy" if unpacked else "local copy, differs"}
    assert str(tmp_path) not in json.dumps(about)
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset.json", "interactions.parquet", "items.parquet", "users.parquet",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, "out"]


def test_the_same_source_is_not_prepared_again(tmp_path: Path) -> None:
    source = write_archive(tmp_path / "mine.zip", files_1m())
    out = catalogue.prepare("ml-1m", tmp_path / "out", source=source)
    first = (out / "interactions.parquet").stat()
    assert (catalogue.prepare("ml-1m", out, source=source) / "interactions.parquet").stat() == first
    shorter = files_1m()
    shorter["ml-1m/ratings.dat"] = shorter["ml-1m/ratings.dat"].split(b"\n")[0] + b"\n"
    write_archive(source, shorter)
    assert len(load_dataset(catalogue.prepare("ml-1m", out, source=source))) == 1


def test_what_came_from_the_publisher_needs_no_network_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_archive(tmp_path / "ml-1m.zip", files_1m())
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    right = movielens.Release(hashlib.md5(source.read_bytes()).hexdigest(), "", movielens.RELEASES["ml-1m"].files)
    monkeypatch.setattr(movielens, "RELEASES", {"ml-1m": right})
    out = catalogue.prepare("ml-1m", tmp_path / "out", source=source)
    assert read_json(out / "dataset.json")["provenance"][0]["verified"] == "known"
    monkeypatch.setattr("data_scripts.entry.fetch", None)  # a call would fail
    assert catalogue.prepare("ml-1m", out) == out
    monkeypatch.setattr(movielens, "RELEASES", {"ml-1m": movielens.Release("0" * 32, "", right.files)})
    with pytest.raises(TypeError):
        catalogue.prepare("ml-1m", out)


def test_a_wrong_source(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "mine.zip", files_1m())
    for name, source, match in (
        ("ml-100k", archive, "holds no u.data"),
        ("ml-1m", tmp_path / "none", "no such file or folder"),
        ("ml-1m", write_folder(tmp_path / "other", {"a": b""}), "holds neither ml-1m.zip nor the files that are in it"),
        ("ml-1m", write_folder(tmp_path / "some", {"movies.dat": b""}), "holds no ratings.dat"),
        ("simulated", archive, "--from does not apply"),
    ):
        with pytest.raises(UserError, match=match):
            catalogue.prepare(name, tmp_path / "out", source=source)
        assert not (tmp_path / "out").exists()


LASTFM = {
    "user_artists.dat": "userID\tartistID\tweight\r\n2\t51\t13883\r\n2\t52\t11690\r\n3\t51\t1\r\n",
    "artists.dat": 'id\tname\turl\tpictureURL\r\n51\tDuran "Duran"\thttp://x\thttp://y\r\n52\tMänner\thttp://x\t\r\n',
    "tags.dat": "tagID\ttagValue\r\n1\tmetal\r\n2\t80's\r\n3\tpop\r\n",
    "user_taggedartists-timestamps.dat": "userID\tartistID\ttagID\ttimestamp\r\n"
    "2\t52\t1\t1238536800000\r\n2\t51\t3\t1238536801000\r\n3\t51\t3\t1238536802000\r\n2\t51\t2\t1238536800500\r\n"
    "3\t52\t1\t-428720400000\r\n",
}


def test_lastfm(tmp_path: Path) -> None:
    source = write_archive(tmp_path / "x.zip", {name: text.encode() for name, text in LASTFM.items()})
    listens = load_dataset(catalogue.prepare("lastfm-2k", tmp_path / "listens", source=source))
    assert rows_of(listens) == [(2, 51, 13883, None), (2, 52, 11690, None), (3, 51, 1, None)]
    assert feature(listens, "title") == {51: 'Duran "Duran"', 52: "Männer"}
    assert feature(listens, "tags") == {51: ["pop", "80's"], 52: ["metal"]}
    tags = load_dataset(catalogue.prepare("lastfm-2k-tags", tmp_path / "tags", source=source))
    expected = {(2, 52, None, 1238536800.0), (2, 51, None, 1238536800.5), (3, 51, None, 1238536802.0)}
    assert set(rows_of(tags)) == expected and len(tags) == 3
    assert tags.dropped["impossible_time"] == 1
    broken = {name: text.encode() for name, text in LASTFM.items()} | {"user_artists.dat": b"userID\tartistID\n1\t2\n"}
    with pytest.raises(UserError, match=r"user_artists\.dat.*weight"):
        catalogue.prepare("lastfm-2k", tmp_path / "broken", source=write_archive(tmp_path / "y.zip", broken))


STRICT = '{"reviewerID": "A2", "asin": "B001", "overall": 5.0, "unixReviewTime": 1390435200, "reviewText": "it\'s"}\n'
LOOSE = (
    "{'reviewerID': u'A1', 'asin': '0005', 'overall': 1.0, 'unixReviewTime': 1390435201, 'reviewText': 'say \"x\"'}\n"
)
META_LOOSE = (
    "{'asin': 'B001', 'title': 'Soap &amp; Water', 'brand': '', "
    "'categories': [['Beauty', 'Soap'], ['Beauty', 'Bath']]}\n"
    "{'asin': 'B001', 'title': 'again'}\n{'asin': '0005', 'price': 3.5}\n{'asin': 'B009', 'title': 'not reviewed'}\n"
)


@pytest.mark.parametrize("packed", [True, False])
def test_amazon_5core(tmp_path: Path, packed: bool) -> None:
    pack = gzip.compress if packed else bytes
    source = tmp_path / "reviews_Beauty_5.json.gz"
    source.write_bytes(pack((STRICT + LOOSE + "\n").encode()))
    out = catalogue.prepare("amazon-2014-5core:Beauty", tmp_path / "out", source=source)
    dataset = load_dataset(out)
    assert rows_of(dataset) == [("A2", "B001", 5.0, 1390435200.0), ("A1", "0005", 1.0, 1390435201.0)]
    assert dataset.name == "amazon-2014-5core:Beauty" and dataset.item_features is None
    assert read_json(out / "dataset.json")["provenance"][0]["verified"] == "local copy"


def test_amazon_metadata(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "mine",
        {
            "reviews_Beauty_5.json": (STRICT + LOOSE).encode(),
            "meta_Beauty.json.gz": gzip.compress(META_LOOSE.encode()),
        },
    )
    options = {"category": "Beauty", "metadata": True}
    dataset = load_dataset(catalogue.prepare("amazon-2014-5core", tmp_path / "out", source=folder, options=options))
    assert feature(dataset, "title") == {"B001": "Soap & Water", "0005": None}
    assert feature(dataset, "categories") == {"B001": ["Beauty", "Soap", "Bath"], "0005": []}
    with pytest.raises(UserError, match=r"reviews_Beauty_5\.json\.gz and meta_Beauty\.json\.gz"):
        catalogue.prepare("amazon-2014-5core", tmp_path / "x", source=folder / "reviews_Beauty_5.json", options=options)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{'a': __import__('os').system('touch hacked')}", "row 2: is neither"),
        ("[1, 2]", "row 2: is neither"),
        ("{" * 100_000, "row 2: is neither"),
        ("{'a': " + "-" * 100_000 + "1}", "row 2: is neither"),
        ("[" * 100_000, "row 2: is neither"),
        (b"{'reviewerID': '\xff'}", "row 2: is neither"),
        ('{"reviewerID": "A1", "asin": 5, "overall": 1, "unixReviewTime": 1}', "row 2, column asin"),
        ('{"reviewerID": "A1", "asin": "B", "overall": "5", "unixReviewTime": 1}', "row 2, column overall"),
        ('{"reviewerID": "A1", "asin": "B", "overall": 5}', "row 2, column unixReviewTime"),
        ("x" * (1 << 20), "row 2: is longer than"),
    ],
)
def test_amazon_bad_lines(tmp_path: Path, line: str | bytes, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "mine.json.gz"
    source.write_bytes(gzip.compress(STRICT.encode() + (line.encode() if isinstance(line, str) else line) + b"\n"))
    with pytest.raises(UserError, match=match):
        catalogue.prepare("amazon-2018-5core:Software", tmp_path / "out", source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json.gz"]


def test_amazon_damaged_and_expanding_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "mine.json.gz"
    source.write_bytes(gzip.compress(STRICT.encode() * 100)[:-20])
    with pytest.raises(UserError, match="damaged"):
        catalogue.prepare("amazon-2018-5core:Software", tmp_path / "out", source=source)
    source.write_bytes(gzip.compress(STRICT.encode() * 10_000))
    monkeypatch.setattr(amazon_reviews, "EXPANSION_FLOOR", 100_000)
    with pytest.raises(UserError, match="expands to more than"):
        catalogue.prepare("amazon-2018-5core:Software", tmp_path / "out", source=source)


def test_amazon_ratings_of_both_years(tmp_path: Path) -> None:
    old, new = tmp_path / "ratings_Beauty.csv", tmp_path / "Software.csv"
    old.write_text("A39HTATAQ9V7YF,0205616461,5.0,1369699200\nA3JM6GV9MNOF9X,0558925278,3.0,1355443200\n")
    new.write_text("0077613252,A240ORQ2LF9LUI,4.0,1394496000\n0077613252,A1YCCU0YRLS0FE,4.0,1393113600\n")
    first = load_dataset(catalogue.prepare("amazon-2014-ratings:Beauty", tmp_path / "old", source=old))
    assert rows_of(first)[0] == ("A39HTATAQ9V7YF", "0205616461", 5.0, 1369699200.0)
    second = load_dataset(catalogue.prepare("amazon-2018-ratings:Software", tmp_path / "new", source=new))
    assert rows_of(second)[0] == ("A240ORQ2LF9LUI", "0077613252", 4.0, 1394496000.0)
    for name, source in (("amazon-2014-ratings:Beauty", new), ("amazon-2018-ratings:Software", old)):
        with pytest.raises(UserError, match="of the other year"):
            catalogue.prepare(name, tmp_path / "swapped", source=source)
    new.write_text("0077613252,A240ORQ2LF9LUI,4.0\n")
    with pytest.raises(UserError, match="row 1: wanted four fields"):
        catalogue.prepare("amazon-2018-ratings:Software", tmp_path / "short", source=new)


def test_the_catalogue() -> None:
    names = catalogue.names()
    assert names[0] == "simulated" and len(set(names)) == len(names)
    for row in catalogue.describe():
        assert row["name"] in names
        assert all(row[field] for field in ("what", "size", "licence", "citation"))
        assert row["simulated"] or row["url"].startswith("https://")
    simulated = [row["name"] for row in catalogue.describe() if row["simulated"]]
    assert simulated == ["simulated"]
    assert all(len(digest) == 64 for digest in RATINGS_2018_SHA256.values())
    assert (len(CATEGORIES[2014]), len(CATEGORIES[2018]), len(lastfm.SHA256)) == (24, 29, 64)
    assert catalogue.folder_name("amazon-2014-5core:Toys_and_Games") == "amazon-2014-5core-toys-and-games"


def test_print_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert catalogue.print_list(as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == catalogue.describe()
    assert catalogue.print_list() == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in catalogue.names())


def test_every_download_is_from_the_publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def record(url: str, known: str | None, *_: object, **__: object) -> None:
        asked.append((url, known))
        raise UserError("stop")

    monkeypatch.setattr("data_scripts.entry.fetch", record)
    for name in catalogue.names():
        for category in CATEGORIES[int(name.split("-")[1])] if name.startswith("amazon") else [None]:
            if name != "simulated":
                with pytest.raises(UserError, match="stop"):
                    catalogue.prepare(f"{name}:{category}" if category else name, tmp_path / "out")
    assert len(asked) == 7 + 2 * (24 + 29)
    for url, known in asked:
        assert url.startswith(("https://files.grouplens.org/", "https://mcauleylab.ucsd.edu/"))
        assert known is not None or "5.json.gz" in url or "/data/amazon/" in url


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("ml-2m", {}, "did you mean ml-"),
        ("zzz", {}, "known: simulated, ml-100k"),
        ("amazon-2014-5core", {}, "wants a category"),
        ("amazon-2014-5core:beauty", {}, "did you mean Beauty"),
        ("amazon-2014-5core:Beauty", {"colour": 1}, "no option 'colour'"),
        ("amazon-2014-5core:Beauty", {"metadata": "yes"}, "metadata: got 'yes'"),
        ("ml-1m:Beauty", {}, "no option 'category'"),
        ("lastfm-2k", {"x": 1}, "no option 'x'"),
        ("simulated", {"n_user": 5}, "did you mean n_users"),
    ],
)
def test_wrong_names_and_options(tmp_path: Path, name: str, options: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        catalogue.prepare(name, tmp_path / "out", options=options)
    assert list(tmp_path.iterdir()) == []


def test_simulated_from_the_catalogue(tmp_path: Path) -> None:
    out = catalogue.prepare("simulated", tmp_path / "out", options={"n_users": 50, "n_items": 40})
    assert read_json(out / "dataset.json")["simulated"] is True
    assert pq.read_metadata(out / "users.parquet").num_rows == 50
