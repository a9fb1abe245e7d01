"""The recommender's commands end to end: results on stdout, mistakes in one line, and nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apps.cli import main
from apps.recsys import bench, fitting
from kdcore.run import read_json, read_log
from tests.recsys.tiny_run import N_ITEMS, N_USERS, PER_USER, write_log

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ["--recipe", "relaxed_ranking", "--student.trainer.max_epochs", "2"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("cli-data") / "log.csv")


@pytest.fixture(scope="module")
def run(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["recsys", "run", *RECIPE, "--data", str(log), "--seeds", "0,1", "--out", str(out)]) == 0
    return out


def one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line that a mistaken command prints."""
    capsys.readouterr()
    code = main(words)
    captured = capsys.readouterr()
    # progress is no error: it comes before
    lines = [line for line in captured.err.splitlines() if not line.startswith("reading ")]
    assert (code, captured.out, len(lines)) == (2, "", 1), captured
    assert lines[0].startswith("kd: error: ")
    return lines[0]


def weights(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.glob("**/model.safetensors"))}


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in ("latency_ms", "train_seconds", "train_cpu_seconds")} for row in rows
    ]


# -- what works


def test_run_leaves_the_contract(run: Path) -> None:
    files = {each.name for each in run.iterdir()}
    assert {"config.yaml", "provenance.json", "metrics.json", "log.jsonl", "report.html"} <= files
    for role in ("teacher", "student", "student_alone"):
        assert {each.name for each in (run / role).iterdir()} == {"model.safetensors", "model.json"}
    rows = read_json(run / "metrics.json")
    assert {row["role"] for row in rows} == {"teacher", "student", "student_alone", "baseline"}
    assert {row["seed"] for row in rows} == {0, 1} and {row["split"] for row in rows} == {"valid", "test"}
    assert {event["role"] for event in read_log(run / "log.jsonl")} >= {"student", "student_alone"}
    assert not list(run.rglob("*.tmp"))


def test_the_same_command_again_changes_nothing(run: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, models = read_json(run / "metrics.json"), weights(run)
    capsys.readouterr()
    assert main(["recsys", "run", *RECIPE, "--data", str(log), "--seeds", "0,1", "--out", str(run), "--json"]) == 0
    captured = capsys.readouterr()
    assert untimed(json.loads(captured.out)) == untimed(before) and weights(run) == models
    assert "fitting" not in captured.err
    assert main(["recsys", "evaluate", "--out", str(run)]) == 0  # a finished run needs no recipe
    assert str(run / "report.html") in capsys.readouterr().out.replace("\n", "")


def test_prepare_prints_statistics(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recsys", "prepare", *RECIPE, "--data", str(log), "--out", str(tmp_path / "run")]
    assert main([*words, "--json"]) == 0
    statistics = json.loads(capsys.readouterr().out)
    assert (statistics["users"], statistics["items"]) == (N_USERS, N_ITEMS)
    assert statistics["interactions"] == N_USERS * PER_USER
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "360" in text and "density" in text and "30.000 %" in text


def test_stages_one_by_one(log: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = [*RECIPE, "--data", str(log), "--seeds", "0,1", "--out", str(out)]
    for verb in ("teach", "distill"):
        assert main(["recsys", verb, *words]) == 0
        assert capsys.readouterr().out.strip() == str(out)
    assert not (out / "metrics.json").exists()
    assert main(["recsys", "evaluate", "--out", str(out)]) == 0
    assert weights(out) == weights(run)
    assert untimed(read_json(out / "metrics.json")) == untimed(read_json(run / "metrics.json"))


def test_recommend_and_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users, out = tmp_path / "users.txt", tmp_path / "recs.parquet"
    users.write_text("ü3\nü1\nü3\n", encoding="utf-8")
    words = ["recsys", "recommend", "--run", str(run), "--users", str(users), "--k", "4", "--out", str(out)]
    capsys.readouterr()
    assert main([*words, "--exclude-seen", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        **{"rows": 8, "users": 2, "repeated_users": 1, "model": "mf-8", "out": str(out)},
    }
    assert captured.err == f"{users}: 1 repeated users left out\n"
    assert pq.read_table(out)["user_id"].to_pylist() == ["ü3"] * 4 + ["ü1"] * 4
    assert main([*words, "--model", "teacher"]) == 0
    assert capsys.readouterr().out == f"8 rows for 2 users: {out}\n"

    folder = tmp_path / "exported"
    assert main(["recsys", "export", "--run", str(run), "--out", str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    about = read_json(folder / "model.json")
    assert captured.err == "" and json.loads(captured.out) == {
        **{"out": str(folder), "label": "mf-8"},
        **{name: about[name] for name in ("model_version", "parity")},
    }
    assert main(["report", str(run)]) == 0
    assert "mf-8" in capsys.readouterr().out


def test_own_files_and_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"u{user},i{(user * 3 + step) % 11}" for user in range(12) for step in range(6)]
    for part, chosen in (("train", rows), ("valid", rows[::6]), ("test", rows[1::6])):
        (tmp_path / f"{part}.csv").write_text("\n".join(["who,what", *chosen]) + "\n")
    files = [word for part in ("train", "valid", "test") for word in (f"--{part}", str(tmp_path / f"{part}.csv"))]
    words = ["recsys", "prepare", *RECIPE, *files, "--columns", "user_id=who,item_id=what", "--json"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["users"] == 12
    assert "wanted one or the other" in one_line([*words, "--data", "ml-100k"], capsys)
    assert "all three" in one_line(
        [*words[: -len(["--columns", "x", "--json"]) - 2], "--out", str(tmp_path / "b")], capsys
    )


def test_interrupted_run_goes_on(
    log: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["recsys", "run", *RECIPE, "--data", str(log), "--seeds", "0,1", "--out", str(out)]
    real, fitted = fitting.fit_model, []

    def impatient(*arguments: Any, **options: Any) -> Any:
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(arguments[0].kind)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "fit_model", impatient)
        assert main(words) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    done = weights(out)
    assert done and not (out / "metrics.json").exists()
    assert main(words) == 0
    after = weights(out)
    assert after == weights(run) and done.items() <= after.items()
    assert untimed(read_json(out / "metrics.json")) == untimed(read_json(run / "metrics.json"))


# -- what does not


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "wanted --recipe NAME or --config FILE, or --out RUN"),
        (["run", "--recipe", "relaxed_rankin", "--data", "LOG"], "did you mean relaxed_ranking"),
        (["run", "--config", "nowhere.yaml", "--data", "LOG"], "nowhere.yaml: No such file"),
        (["run", *RECIPE], "wanted --data NAME or PATH"),
        (["run", *RECIPE, "--data", "ml-100"], "no data set or path 'ml-100'"),
        (["run", *RECIPE, "--data", "ml-32m"], "get it with kd data prepare ml-32m"),
        (["run", *RECIPE, "--data", "LOG", "--seeds", "x"], "--seeds: got 'x', wanted whole numbers such as 0,1,2"),
        (["run", *RECIPE, "--data", "LOG", "--seeds", "1,1"], "seeds: got [1, 1], wanted distinct seeds"),
        (["run", *RECIPE, "--data", "LOG", "--sedes", "1"], "unknown argument '--sedes', did you mean --seeds"),
        (["run", *RECIPE, "--data", "LOG", "--studnt.kind", "mf"], "'studnt', did you mean student?"),
        (["run", *RECIPE, "--data", "LOG", "--student.trainer.epochs", "1"], "'student.trainer.epochs', did"),
        (["run", *RECIPE, "--data", "LOG", "--student.options.dimensio", "1"], "did you mean dimension?"),
        (["run", *RECIPE, "--data", "LOG", "--student.trainer.max_epochs", "many"], "student.trainer.max_epochs"),
        (["run", *RECIPE, "--data", "LOG", "--student.kind", "nf"], "did you mean mf?"),
        (["run", *RECIPE, "--data", "LOG", "--knowledge.relaxed.weight", "1"], "did you mean relaxed_ranking"),
        (["run", *RECIPE, "--data", "LOG", "--split.kind", "leave_out"], "did you mean leave_last_out?"),
        (["run", *RECIPE, "--data", "LOG", "--columns", "user_id"], "wanted canonical=yours pairs"),
        (["run", *RECIPE, "--data", "LOG", "--columns", "user=a"], "unknown name 'user'"),
        (["run", *RECIPE, "--data", "LOG", "--columns", "user_id=nope"], "nope"),
        (["prepare", *RECIPE, "--data", "LOG", "--k_core", "9"], "unknown argument '--k_core'"),
        (["run", *RECIPE, "--data", "LOG", "--metrics", "[ndgc@10]"], "did you mean ndcg"),
        (["run", *RECIPE, "--data", "LOG", "--metric", "[ndcg@10]"], "did you mean --metrics"),
        (["recommend", "--out", "x.parquet"], "required: --run"),
        (["recommend", "--run", "nowhere", "--out", "x.parquet"], "nowhere: no run here"),
        (["recommend", "--run", "nowhere", "--modle", "teacher", "--out", "x"], "did you mean --model?"),
        (
            ["recommend", "--run", "nowhere", "--model", "assistant", "--out", "x"],
            "--model: got 'assistant', did you mean student?",
        ),
        (["recommend", "--run", "nowhere", "--k", "ten", "--out", "x"], "argument --k: invalid int value: 'ten'"),
        (["export", "--run", "nowhere", "--out", "x"], "nowhere: no run here"),
        (["evaluate", "--out", "nowhere"], "nowhere: no run here"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = one_line(["recsys", *(str(log) if word == "LOG" else word for word in words)], capsys)
    assert message in line
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_another_run_is_not_overwritten(run: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, models = (run / "config.yaml").read_bytes(), weights(run)
    words = ["recsys", "run", *RECIPE, "--data", str(log), "--out", str(run)]
    assert "holds a run with other settings (seeds)" in one_line([*words, "--seeds", "5"], capsys)
    changed = one_line([*words, "--seeds", "0,1", "--student.options.dimension", "4"], capsys)
    assert "student.options.dimension" in changed
    assert f"without, {run} keeps its settings" in one_line(
        ["recsys", "run", "--out", str(run), "--seeds", "5"], capsys
    )
    new = str(run.parent / "not-there")
    assert "no run is there to go on with; a new one wants --recipe" in one_line(
        ["recsys", "run", "--out", new, "--data", str(log)], capsys
    )
    assert (run / "config.yaml").read_bytes() == before and weights(run) == models


def test_an_out_that_cannot_be_written(run: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = str(log / "inside")  # below a file; root may write anywhere else
    assert str(log) in one_line(["recsys", "recommend", "--run", str(run), "--out", inside], capsys)
    assert str(log) in one_line(["recsys", "export", "--run", str(run), "--out", inside], capsys)
    assert "is a file" in one_line(["recsys", "run", *RECIPE, "--data", str(log), "--out", str(log)], capsys)


ROWS = [f"u{user},i{item},{user * 20 + item},3" for user in range(5) for item in range(15)]
HEADER = "user_id,item_id,timestamp,rating"


def table(*, replace: dict[int, str] | None = None, header: str = HEADER, rows: list[str] = ROWS) -> bytes:
    lines = [header, *rows]
    for number, line in (replace or {}).items():
        lines[number - 1] = line
    return ("\n".join(lines) + "\n").encode()


SHORT = [f"u{user},i{user % 4},{user},1" for user in range(20)]
BAD_DATA: dict[str, tuple[str, bytes, list[str], str]] = {
    "missing column": ("log.csv", table(header="who,item_id,timestamp,rating"), [], "log.csv: row 1"),
    "NaN rating": ("log.csv", table(replace={5: "u0,i3,3,NaN"}), [], "log.csv: row 5, column rating"),
    "bad time": ("log.csv", table(replace={4: "u0,i2,soon,3"}), [], "log.csv: row 4, column timestamp"),
    "empty id": ("log.csv", table(replace={3: ",i1,1,3"}), [], "log.csv: row 3, column user_id"),
    "short row": ("log.csv", table(replace={6: "u0,i4"}), [], "log.csv: row 6"),
    "no rows": ("log.csv", table(rows=[]), [], "log.csv: holds no interactions"),
    "empty file": ("log.csv", b"", [], "log.csv"),
    "binary garbage": ("log.csv", bytes(range(256)) * 50, [], "log.csv: row 1"),
    "not parquet": ("log.parquet", b"PAR1" + bytes(range(256)), [], "log.parquet: not readable as Parquet"),
    "not json": ("log.jsonl", b'{"user_id": 1, "item_id": 2}\n{"user_id": 1,\n', [], "log.jsonl: row 2"),
    "json without id": ("log.jsonl", b'{"user_id": 1, "item_id": 2}\n{"user_id": 1}\n', [], "row 2, column item_id"),
    "bad gzip": ("log.csv.gz", b"\x1f\x8b rubbish", [], "log.csv.gz: not a whole gzip file"),
    "ratings all too low": ("log.csv", table(), ["--data.min_rating", "9"], "log"),
    "one-interaction users": ("log.csv", table(rows=SHORT), ["--split.kind", "leave_last_out"], "leaves no interact"),
    "empty split": ("log.csv", table(rows=SHORT), [], "the ratio split leaves no interactions for valid"),
    "no timestamps": (
        "log.csv",
        table(header="user_id,item_id", rows=[row.rsplit(",", 2)[0] for row in ROWS]),
        ["--split.kind", "global_time"],
        "needs timestamps",
    ),
    "unknown format": ("log.xyz", b"what is this\n", [], "the format is not known"),
}


@pytest.mark.parametrize("verb", ["prepare", "run"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_says_where_and_does_not_block_the_corrected_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, verb: str
) -> None:
    file, content, options, message = BAD_DATA[name]
    (tmp_path / file).write_bytes(content)
    out = tmp_path / "run"
    words = ["recsys", verb, *RECIPE, "--out", str(out)]
    assert message in one_line([*words, "--data", str(tmp_path / file), *options], capsys)
    assert sorted(each.name for each in tmp_path.iterdir()) == [file]
    if verb == "prepare":
        good = write_log(tmp_path / "good.csv", titles=False)
        assert main([*words, "--data", str(good), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["users"] == N_USERS


def test_a_bad_parquet_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": [1, 2], "item_id": [1, 2], "rating": [1.0, float("nan")]}), path)
    words = ["recsys", "prepare", *RECIPE, "--data", str(path), "--out", str(tmp_path / "run")]
    assert "log.parquet: row 2, column rating" in one_line(words, capsys)


def test_skip_bad_counts_what_it_drops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(table(replace={5: "u0,i3,3,NaN"}))
    words = ["recsys", "prepare", *RECIPE, "--data", str(path), "--out", str(tmp_path / "run"), "--json"]
    one_line(words, capsys)
    assert main([*words, "--skip-bad"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"]["bad"] == 1


def test_preparation_that_was_killed_does_not_bind(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("recipe: another\n")  # written, and then the data never came
    assert main(["recsys", "prepare", *RECIPE, "--data", str(log), "--out", str(out)]) == 0


def test_results_on_stdout_progress_on_stderr(log: Path, tmp_path: Path) -> None:
    words = ["recsys", "teach", *RECIPE, "--data", str(log), "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "apps.cli", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert (done.returncode, json.loads(done.stdout)) == (0, {"run": str(tmp_path / "run")})
    assert "fitting teacher (ease)" in done.stderr


def test_a_benchmark_prints_json_and_writes_it_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.BENCHMARKS, "train", lambda work: {"cost": 1.04})
    for more in ([], ["--json"], ["--json", str(tmp_path / "train.json")]):
        assert main(["recsys", "bench", "train", *more]) == 0
        assert json.loads(capsys.readouterr().out)["cost"] == 1.04
    assert read_json(tmp_path / "train.json")["cost"] == 1.04 and len(list(tmp_path.iterdir())) == 1
