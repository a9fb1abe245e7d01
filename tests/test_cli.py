"""``kd`` as a user meets it: help for everything, instantly, and one line for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.cli import main
from kdcore.command_line import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, guarded, integers, split_overrides
from kdcore.config import UserError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    *([], ["demo"], ["recipes"], ["report"], ["data"], ["data", "list"], ["data", "prepare"], ["recsys"]),
    *(["data", "simulate", *what] for what in ([], ["speech"], ["interactions"])),
    *(["recsys", verb] for verb in ("prepare", "teach", "distill", "evaluate", "run", "tune")),
    *(["recsys", verb] for verb in ("recommend", "export", "bench")),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    examples = text.partition("\nexample")[2]
    # the example is of this very command
    assert " ".join(["kd", *words]) in examples, text
    assert text.startswith(f"usage: {' '.join(['kd', *words])}")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recsys", "--help"], ["recsys", "run", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    heavy = ("torch", "numpy", "pandas", "pyarrow", "scipy", "jsonargparse", "rich", "onnx", "lightning_fabric")
    done = python(
        "import sys\n"
        "from apps.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"print(code, [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    assert done.stderr.strip() == "0 []"


def test_a_mistake_is_one_line_and_2_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apps.cli", "recsys", "trian"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [done.stderr.rstrip("\n")] and "did you mean" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND (see kd --help)"),
        (["recsy"], "got 'recsy', did you mean recsys"),
        (["recsys"], "the following arguments are required: VERB (see kd recsys --help)"),
        (["recsys", "recomend"], "did you mean recommend"),
        (["demo", "rexsys"], "got 'rexsys', did you mean recsys?"),
        (["data", "prepare", "ml1m"], "did you mean ml-1m"),
        (["data", "prepare"], "required: name (see kd data prepare --help)"),
        (["report"], "required: run (see kd report --help)"),
        (["report", "nowhere"], "nowhere: there is no such run directory"),
        (["recipes", "--jsn"], "unrecognized arguments: --jsn"),
        (["recipes", "--domain", "speach"], "--domain: got 'speach', did you mean speech?"),
        (["recipes", "--domain", "x"], "--domain: got 'x', wanted one of recsys, speech"),
        (["data", "simulate", "spech", "--out", "x"], "did you mean speech?"),
        (["data", "simulate", "speech"], "required: --out"),
        (["data", "simulate", "speech", "--utterances", "2", "--out", "x"], "utterances: got 2, wanted a whole number"),
        (["data", "simulate", "speech", "--snr", "20", "5", "--out", "x"], "snr: got (20.0, 5.0), wanted two numbers"),
        (["data", "simulate", "speech", "--no-noise", "--snr", "5", "20", "--out", "x"], "not allowed with"),
        (["data", "simulate", "speech", "--seed", "-1", "--out", "x"], "seed: got -1"),
        (["data", "simulate", "speech", "--silence", "2", "1", "--out", "x"], "silence: got (2.0, 1.0), wanted two"),
        (["data", "simulate", "speech", "--silence", "0", "1e9", "--out", "x"], "from 0 to 60"),
        (["data", "simulate", "speech", "--texts", "nowhere.txt", "--out", "x"], "nowhere.txt: No such file"),
        (["data", "simulate", "interactions", "--users", "0", "--out", "x"], "n_users: got 0"),
    ],
)
def test_mistakes(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("kd: error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_recipes_and_data_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    files = {file.stem for file in (ROOT / "apps" / "recsys" / "recipes").glob("*.yaml")}
    assert {row["recipe"] for row in rows if row["wing"] == "recsys"} == files
    assert all(row["title"] and row["reference"] for row in rows)
    assert main(["recipes"]) == 0
    assert "relaxed_ranking" in capsys.readouterr().out
    for wing in ("recsys", "speech"):
        assert main(["recipes", "--domain", wing, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [row for row in rows if row["wing"] == wing] != []
    assert main(["data", "list", "--json"]) == 0
    assert {"simulated", "ml-1m"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}


def test_a_data_set_is_simulated_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["interactions", "--users", "40", "--items", "30", "--seed", "3", "--out", str(tmp_path / "clicks")]
    assert main(["data", "simulate", *words]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'clicks'}\n"
    about = json.loads((tmp_path / "clicks" / "dataset.json").read_text())["parameters"]
    assert (about["n_users"], about["n_items"], about["seed"]) == (40, 30, 3)


@pytest.mark.parametrize(("noise", "snr"), [([], [10, 30]), (["--snr", "-5", "10"], [-5, 10]), (["--no-noise"], None)])
def test_speech_is_simulated_as_asked(
    noise: list[str], snr: list[float] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install kdsuite[speech]")
    pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed: pip install kdsuite[simulate]")
    out = tmp_path / "spoken"
    assert main(["data", "simulate", "speech", "--utterances", "3", "--seed", "4", *noise, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    about = json.loads((out / "dataset.json").read_text())
    assert (about["utterances"], about["seed"], about["snr"]) == (3, 4, snr)
    assert "texts" not in about and "silence" not in about
    (tmp_path / "mine.txt").write_text("open the door\n\n  close  it \n", encoding="utf-8")
    words = ["--utterances", "6", *noise, "--texts", str(tmp_path / "mine.txt"), "--silence", "0", "0.05"]
    assert main(["data", "simulate", "speech", *words, "--out", str(out)]) == 0
    about = json.loads((out / "dataset.json").read_text())
    assert (about["texts"], about["silence"], about["snr"]) == (["open the door", "close it"], [0, 0.05], snr)
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert {line["text"] for line in lines} == {"open the door", "close it"}


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            UserError("log.csv: row 3,\n column rating: is empty"),
            EXIT_USAGE,
            "kd: error: log.csv: row 3, column rating",
        ),
        (FloatingPointError("loss bpr is not finite"), EXIT_FAILURE, "kd: failed: loss bpr is not finite"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "kd: interrupted; the same command goes on from here"),
        (PermissionError(13, "Permission denied", "/x"), EXIT_USAGE, "kd: error: /x: Permission denied"),
        (OSError(28, "No space left on device"), EXIT_FAILURE, "kd: failed: [Errno 28] No space left on device"),
        (ModuleNotFoundError("no", name="torch.nn"), EXIT_FAILURE, "kd: failed: this needs the package torch: pip"),
    ],
)
def test_exit_codes(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(raising(error)) == code
    text = capsys.readouterr().err
    assert text.startswith(line) and text.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("x"), ModuleNotFoundError("no", name="apps.recsys.nothing")])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        guarded(raising(error))


def test_overrides() -> None:
    assert split_overrides(["--a.b", "1", "--c.d=x=y", "--e.f", "-1"]) == [("a.b", "1"), ("c.d", "x=y"), ("e.f", "-1")]
    for words, message in (
        (["--a.b"], "--a.b: wanted a value"),
        (["--a.b", "--c.d", "1"], "--a.b: wanted a value"),
        (["stray"], "unknown argument 'stray', see --help"),
        (["--sedes", "1"], "unknown argument '--sedes', did you mean --seeds?"),
        (["--.", "1"], "unknown argument"),
    ):
        with pytest.raises(UserError, match=message):
            split_overrides(words, ["--seeds", "--out"])
    assert integers("0,1,2") == [0, 1, 2]
