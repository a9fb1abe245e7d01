"""The commands of the speech wing, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from apps.cli import main
from apps.speech import cli
from apps.speech.config import load_config
from apps.speech.decode.lm import check_arpa
from data_scripts.simulate_speech import simulate
from kdcore.config import dump_yaml
from kdcore.run import read_json
from tests.speech.hugging_face import pretrained
from tests.speech.small_runs import SIZES


def test_recipes_of_the_wing_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    rows = {row["recipe"]: row for row in json.loads(capsys.readouterr().out) if row["wing"] == "speech"}
    assert set(rows) == {
        *("ctc_frame_level", "ctc_sequence_level", "ctc_segment_nbest", "ctc_guided", "teacher_ensemble"),
        *("clean_to_noisy", "lstm_to_cnn", "transformer_layers", "attention_to_ctc", "event_detection_int8", "demo"),
    }
    assert "Takashima" in rows["ctc_sequence_level"]["reference"]


def test_the_demo_of_the_wing_ends_with_a_table_a_transcript_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is, but of fewer recordings and with tiny models of one epoch."""
    monkeypatch.chdir(tmp_path)
    less = partial(simulate, utterances=36)
    monkeypatch.setattr("data_scripts.simulate_speech.simulate", less)
    whole, tiny = cli.main, [f"--{side}.trainer.max_epochs=1" for side in ("teacher", "student")]
    # beside other tests, threads wait for one another
    tiny += ["--decode.beam=4", "--decode.lm_weights=[1.0]", "--decode.word_scores=[0.0]"]
    tiny += ["--teacher.trainer.threads=1", "--student.trainer.threads=1"]
    tiny += [f"--teacher.options={json.dumps(SIZES['bilstm'])}", f"--student.options={json.dumps(SIZES['conv_rnn'])}"]
    monkeypatch.setattr(cli, "main", lambda words: whole([*words, *tiny]))
    assert main(["demo", "speech"]) == 0
    said = capsys.readouterr().out
    told = ("Teacher", "Student, ", "(alone)", "REF: ", "HYP: ", "these figures are on simulated data", "report.html")
    assert [each for each in told if each not in said] == []
    assert (tmp_path / "runs" / "demo" / "speech" / "report.html").exists()


@pytest.mark.parametrize("verb", ["prepare", "teach", "distill", "evaluate", "run", "shards", "lm", "bench"])
def test_every_command_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["speech", verb, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and f"kd speech {verb}" in text.split("example")[1]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from apps.speech.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'soundfile', 'jiwer') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "[]"


def test_reading_a_recipe_imports_no_lightning() -> None:
    code = "import sys; from apps.speech.config import load_config; load_config(recipe='demo'); "
    code += "print('torch' in sys.modules, 'lightning_fabric' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False"]


def test_a_run_of_the_commands_from_recordings_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No recipe and no data are named, so a corpus is simulated; a small one here."""
    monkeypatch.chdir(tmp_path)
    made = simulate(Path("data/simulated-speech"), utterances=36)
    asked: list[Path] = []

    def simulated(folder: Path, **options: object) -> Path:
        asked.append(folder)
        return made

    monkeypatch.setattr("data_scripts.simulate_speech.simulate", simulated)
    # processes of their own, which test_measure starts
    monkeypatch.setattr("apps.speech.measurement.model_memory", lambda who, features, samples: 1 << 20)
    tiny = []
    for role, kind in (("teacher", "bilstm"), ("student", "conv_rnn")):
        tiny += [f"--{role}.options", json.dumps(SIZES[kind]), f"--{role}.trainer.max_epochs", "1"]
        tiny += [f"--{role}.trainer.threads", "1"]
    tiny += ["--decode.beam", "4", "--decode.lm_weights", "[1.0]", "--decode.word_scores", "[0.0]"]
    assert main(["speech", "run", *tiny]) == 0
    out = tmp_path / "runs" / "demo-simulated-speech"
    said = capsys.readouterr()
    assert asked == [Path("data/simulated-speech")] and "student" in said.out
    assert "these figures are on simulated data" in said.out
    assert (out / "report.html").exists() and (out / "student" / "model.safetensors").exists()
    # a held-out recording, with its alignment
    assert "REF:" in said.out and "HYP:" in said.out
    trained = (out / "seeds" / "0" / "student" / "model.safetensors").stat().st_mtime_ns
    assert main(["speech", "evaluate", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert next((out / "seeds" / "0").glob("student/model.safetensors")).stat().st_mtime_ns == trained


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--recipe", "ctc_sequnce_level", "--data", "x"], "unknown recipe 'ctc_sequnce_level'"),
        (["run", "--recipe", "demo", "--data", "no-such-corpus"], "no-such-corpus is no file or folder"),
        (["run", "--recipe", "demo", "--data", "x", "--student.kindd", "y"], "kindd"),
        (["run", "--recipe", "demo"], "wanted --data"),
        (["run", "--data", "x"], "wanted --recipe NAME"),
        (["evaluate", "--out", "no-run-here"], "no run here"),
        (["lm", "--text", "missing.txt", "--out", "lm.arpa"], "missing.txt"),
        (["run", "--recipe", "demo", "--data", "no-such-corpus", "--test_view", "noise:0:10"], "no-such-corpus"),
        (["run", "--recipe", "demo", "--data", "no-such-corpus", "--test_view", "nois:0:10"], "did you mean noise?"),
        (["run", "--recipe", "demo", "--data", "no-such-corpus", "--test-view=clean"], "did you mean --test_view"),
        (["lm", "--text", "missing.txt", "--order", "9", "--out", "lm.arpa"], "--order: got 9, wanted 2 to 6"),
        (["lm", "--text", "missing.txt", "--order", "1", "--out", "lm.arpa"], "--order: got 1, wanted 2 to 6"),
        (["lm", "--txt", "missing.txt", "--out", "lm.arpa"], "--text"),
        (["run", "--recipe", "demo", "--data", "x", "--student.trainer.accelerator", "mps"], "torch has no CTC"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["speech", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and "Traceback" not in "".join(said)


def test_settings_are_refused_before_a_corpus_is_made_for_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["speech", "run", "--recipe", "demo", "--data", "simulated", "--student.options.width", "0"]
    assert main(words) == 2
    assert "width" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_language_model_from_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("Yes, no!\nno yes\n\nenter five\n", encoding="utf-8")
    out = tmp_path / "lm.arpa"
    assert main(["speech", "lm", "--text", str(tmp_path / "text.txt"), "--order", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert set(check_arpa(out)) == {1, 2} and "enter" in out.read_text(encoding="utf-8")
    # as the transcripts of a run are written
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("data: {path: an4, text: {lower: false}}\n", encoding="utf-8")
    words = ["speech", "lm", "--text", str(tmp_path / "text.txt"), "--order", "2", "--out", str(out), "--run"]
    assert main([*words, str(tmp_path / "run")]) == 0 and "\tYes" in out.read_text(encoding="utf-8")
    (tmp_path / "marks.txt").write_text("yes\n\nno <unk>\n", encoding="utf-8")
    (tmp_path / "run" / "config.yaml").write_text("data: {path: an4, text: {strip_punctuation: false}}\n", "utf-8")
    assert main([*words, str(tmp_path / "run"), "--text", str(tmp_path / "marks.txt")]) == 2
    assert f"{tmp_path / 'marks.txt'}, line 3: got <unk>, wanted words" in capsys.readouterr().err
    assert main([*words, str(tmp_path)]) == 2 and "config.yaml: No such file" in capsys.readouterr().err


def test_texts_without_a_word_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("p.txt", "q.txt"):
        (tmp_path / name).write_text("!!! ...\n", encoding="utf-8")
    assert main(["speech", "lm", "--text", "p.txt", "q.txt", "--out", "lm.arpa"]) == 2
    assert capsys.readouterr().err == "kd: error: p.txt, q.txt: no word to build a language model from\n"


def test_a_benchmark_prints_json_and_writes_it_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apps.speech.bench.train", lambda work: {"cost": 1.04})
    for more in ([], ["--json"], ["--json", str(tmp_path / "train.json")]):
        assert main(["speech", "bench", "train", *more]) == 0
        assert json.loads(capsys.readouterr().out)["cost"] == 1.04
    assert json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))["cost"] == 1.04
    assert len(list(tmp_path.iterdir())) == 1


def test_several_corpora_as_shards_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (str(simulate(tmp_path / name, utterances=24, seed=seed)) for seed, name in enumerate("ab"))
    out = str(tmp_path / "shards")
    words = ["speech", "shards", "--data", f"{first}@split=train", second, "--per-shard", "30", "--out", out]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [f"{out}/shard-00000{number}.tar" for number in range(2)]
    words = ["speech", "prepare", "--recipe", "demo", "--train", out, "--valid", f"{first}@split=valid"]
    words += ["--test", f"{first}@split=test", f"{first}@split=valid@speaker!=nobody"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "no utterance has speaker 'nobody'" in capsys.readouterr().err
    del words[-1]
    assert main([*words, "--out", str(tmp_path / "run"), "--json"]) == 0
    rows = {row["part"]: row for row in json.loads(capsys.readouterr().out)}
    # rows keep their split: of the second corpus only what trains does
    trained = [len((tmp_path / name / "train.jsonl").read_text().splitlines()) for name in "ab"]
    assert rows["train"]["utterances"] == sum(trained) < 44 and rows["train"]["speakers"] > rows["test"]["speakers"]
    assert main(["speech", "shards", "--data", first, "--per-shard", "0", "--out", out]) == 2
    # what is bad is counted, whether its row or its audio is
    manifest = tmp_path / "a" / "some.jsonl"
    lines = (tmp_path / "a" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    gone = {**json.loads(lines[0]), "id": "gone", "audio_filepath": "gone.wav"}
    manifest.write_text("\n".join([*lines, "{", json.dumps(gone)]), encoding="utf-8")
    capsys.readouterr()
    assert main(["speech", "shards", "--data", str(manifest), "--skip-bad", "--out", str(tmp_path / "some")]) == 0
    assert sorted(capsys.readouterr().err.splitlines()) == ["left out, no audio: 1", "left out, unreadable row: 1"]


def test_prepare_says_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = simulate(tmp_path / "data", utterances=24)
    words = ["speech", "prepare", "--recipe", "demo", "--data", str(data), "--out", str(tmp_path / "run"), "--json"]
    assert main(words) == 0
    rows = {row["part"]: row for row in json.loads(capsys.readouterr().out)}
    assert sum(row["utterances"] for row in rows.values()) == 24 and rows["train"]["left out"] == "none"


def test_a_run_can_be_gone_on_with_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    simulate(here / "data", utterances=24)
    simulate(here / "hum", utterances=6)
    for name in ("first", "second"):
        pretrained(here / name, "abcdefghijklmnopqrstuvwxyz'")
    monkeypatch.chdir(here)
    heard = json.dumps([{"student": "noise:5:9:hum", "teacher": "room:hum+noise:5:9:hum"}])
    words = ["speech", "prepare", "--recipe", "demo", "--data", "data", "--out", "run", "--json"]
    words += ["--views", heard, "--test_view", "noise:5:9:hum", "--teacher.path", "first"]
    assert main(words) == 0
    first = capsys.readouterr().out
    kept = load_config(file=here / "run" / "config.yaml")
    assert kept.data.path == str(here / "data") and kept.teacher.path == str(here / "first")
    assert kept.views[0].student == kept.test_view == f"noise:5:9:{here / 'hum'}"
    assert kept.views[0].teacher == f"room:{here / 'hum'}+noise:5:9:{here / 'hum'}"
    monkeypatch.chdir(tmp_path)
    assert main(["speech", "prepare", "--out", str(here / "run"), "--json"]) == 0
    assert capsys.readouterr().out == first
    monkeypatch.chdir(here)
    assert main(words) == 0
    ensemble = {"teacher": {"members": [{"path": "first"}, {"path": "second"}]}, "knowledge": {"frame": {}}}
    Path("ensemble.yaml").write_text(dump_yaml(ensemble), encoding="utf-8")
    assert main(["speech", "prepare", "--config", "ensemble.yaml", "--data", "data", "--out", "other"]) == 0
    two = load_config(file=here / "other" / "config.yaml").teacher.members
    assert [member.path for member in two] == [str(here / "first"), str(here / "second")]
    # a name that is no folder is told as it was typed
    capsys.readouterr()
    assert main([*words[:-1], "facebook/wav2vec2", "--out", "third"]) == 2
    assert "facebook/wav2vec2" in (said := capsys.readouterr().err) and str(here / "facebook") not in said


def test_shards_say_what_their_recordings_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    simulate(tmp_path / "spoken", utterances=12)
    about = json.loads((tmp_path / "spoken" / "dataset.json").read_text())
    (tmp_path / "spoken" / "dataset.json").write_text(json.dumps({**about, "licence": "CC0-1.0"}))
    assert main(["speech", "shards", "--data", "spoken", "--out", "shards"]) == 0
    assert read_json(tmp_path / "shards" / "dataset.json") == {"simulated": True, "licence": "CC0-1.0"}
    words = ["speech", "prepare", "--recipe", "demo", "--data", "shards", "--out", "run"]
    assert main([*words, "--data.valid_speakers", "1", "--data.test_speakers", "1"]) == 0
    assert read_json(tmp_path / "run" / "data" / "data.json")["simulated"] is True


def test_a_folder_that_cannot_be_written_is_told_before_data_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file.txt").touch()
    simulate(tmp_path / "spoken", utterances=12)
    capsys.readouterr()
    words = ["speech", "prepare", "--recipe", "demo", "--data", "spoken", "--out"]
    assert main([*words, "below/file.txt/run"]) == 2
    named = f"kd: error: --out: below/file.txt/run cannot be a folder: {tmp_path}/below/file.txt is a file\n"
    assert capsys.readouterr().err == named
    monkeypatch.setattr("kdcore.folders.os.access", lambda path, mode: path != tmp_path / "below")
    assert main([*words, "below/run"]) == 2
    named = f"kd: error: --out: below/run cannot be written to: {tmp_path}/below does not allow it\n"
    assert capsys.readouterr().err == named


def test_the_option_that_named_what_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    simulate(tmp_path / "spoken", utterances=12)
    for option in ("--valid", "--unlabelled"):
        capsys.readouterr()
        assert main(["speech", "prepare", "--recipe", "demo", "--data", "spoken", option, "nowhere"]) == 2
        assert f"kd: error: {option}: nowhere is no file or folder" in capsys.readouterr().err
    assert main(["speech", "prepare", "--recipe", "demo", "--data", "spoken", "--student.options.sizee", "tiny"]) == 2
    assert "unknown setting 'sizee', did you mean size" in capsys.readouterr().err
