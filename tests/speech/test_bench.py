"""The benchmarks on tiny models: what they compare, what runs share, that they go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from apps.speech import bench_commands, bench_digits, bench_noise, bench_quality, bench_runtime, bench_train
from apps.speech.bench import run_bench
from apps.speech.evaluate import Scores
from data_scripts.simulate_speech import simulate
from kdcore.config import UserError
from kdcore.run import read_json
from tests.speech.small_runs import SIZES, TRAINER

TINY = [
    ("teacher.options", json.dumps(SIZES["bilstm"])),
    ("student.options", json.dumps(SIZES["conv_rnn"])),
    ("decode", '{"beam": 4, "order": 2, "lm_weights": [1.0], "word_scores": [0.0]}'),
    ("data.valid_speakers", "1"),
    *((f"{role}.trainer", json.dumps(TRAINER)) for role in ("teacher", "student")),
    *((f"{role}.optimization", '{"batch_frames": 1500}') for role in ("teacher", "student")),
    ("views", '[{"student": "clean"}]'),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some seconds of simulated speech, in parts."""
    return simulate(tmp_path_factory.mktemp("speech") / "spoken", utterances=36)


def models(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("seeds/**/model.safetensors")}


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wanted some of ctc_sequence_level"):
        run_bench("quality", None, tmp_path, ["ctc_sequnce_level"])
    with pytest.raises(UserError, match="got student_only, wanted some of teacher, student_alone, student"):
        run_bench("digits", None, tmp_path, ["student_only"], lambda folder: [])
    for name in ("train", "noise", "runtime"):
        with pytest.raises(UserError, match=f"is for bench quality and bench digits, got bench {name}"):
            run_bench(name, None, tmp_path, ["ctc_frame_level"])


def test_quality_compares_recipes_under_one_teacher(data: Path, tmp_path: Path) -> None:
    given = {"data": str(data), "seeds": [0], "overrides": TINY}
    only = ["ctc_sequence_level", "ctc_guided"]
    found = bench_quality.run(tmp_path, only, **given)  # type: ignore[arg-type]
    first, second = (found["runs"][name]["models"] for name in only)
    for role in ("teacher", "student_alone"):
        one, other = (tmp_path / f"speech-{data.name}-{name}" / "seeds" for name in only)
        file = f"{'shared' if role == 'teacher' else '0'}/{role}/model.safetensors"
        assert (one / file).stat().st_ino == (other / file).stat().st_ino
        assert first[role]["metrics"]["cer"] == second[role]["metrics"]["cer"]
    assert first["student"]["metrics"] != second["student"]["metrics"]
    rows = read_json(tmp_path / f"speech-{data.name}-{only[0]}" / "metrics.json")
    wer = {row["role"]: row["metrics"]["wer"] for row in rows if row["split"] == "test"}
    assert first["student"]["metrics"]["wer"] == {"mean": wer["student"], "sd": None}
    difference = found["runs"][only[0]]["differences"]["wer against student_alone, by utterance"]
    assert difference["value"] == pytest.approx(wer["student"] - wer["student_alone"])
    others = [
        row["metrics"]["wer"]
        for row in read_json(tmp_path / f"speech-{data.name}-{only[1]}" / "metrics.json")
        if (row["role"], row["split"]) == ("student", "test")
    ]
    assert all(each["wer"] > 0 and each["folds"] == 0 for each in found["teacher_on_training"].values())
    assert found["between"].keys() == {" against ".join(only)}
    assert found["between"][" against ".join(only)]["wer"]["value"] == pytest.approx(wer["student"] - others[0])
    times = models(tmp_path)
    # where none is named, sequences beside frames; what is there already is kept
    usual = bench_quality.run(tmp_path, **given)  # type: ignore[arg-type]
    assert usual["between"].keys() == {"ctc_sequence_level against ctc_frame_level"}
    assert times.items() <= models(tmp_path).items()
    assert usual["runs"][only[0]]["differences"] == found["runs"][only[0]]["differences"]


def test_train_times_steps_in_turns(data: Path, tmp_path: Path) -> None:
    found = bench_train.run(tmp_path, data=str(data), repeats=2, overrides=TINY)
    assert found["ratio"].keys() == found["median_ms"].keys() == {"ctc", "frame", "sequence of 4"}
    assert found["ratio"]["ctc"] == 1 and 0 <= found["padding_share"] < 1


def test_noise_is_measured_by_ratio(data: Path, tmp_path: Path) -> None:
    noisy = [("views", '[{"student": "noise:0:10"}]')]
    found = bench_noise.run(tmp_path, data=str(data), seeds=[0, 1], overrides=[*TINY, *noisy])
    rates = {role: found["models"][role]["metrics"]["wer"]["mean"] for role in ("student", "student_alone")}
    assert found["relative_difference"] == pytest.approx(rates["student"] / rates["student_alone"] - 1)
    by_utterance = found["differences"]["wer against student_alone, by utterance"]
    assert by_utterance["value"] == pytest.approx(rates["student"] - rates["student_alone"])
    test = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    assert sum(each["utterances"] for each in found["by_snr"]) == len(test)
    scores = Scores.load(next(tmp_path.rglob("test-student-wer-0.jsonl")))
    other = Scores.load(next(tmp_path.rglob("test-student-wer-1.jsonl")))
    first = found["by_snr"][0]
    inside = (scores.snrs >= first["snr_db"][0]) & (scores.snrs < first["snr_db"][1])
    assert inside.sum() == first["utterances"] and ((scores.snrs >= 0) & (scores.snrs <= 10)).all()
    wanted = [float(each.edits[inside].sum() / each.words[inside].sum()) for each in (scores, other)]
    assert first["student"] == pytest.approx(np.mean(wanted))


def test_digits_are_tried_on_speakers_left_out(data: Path, tmp_path: Path) -> None:
    digits = tmp_path / "digits"
    digits.mkdir()
    generator, lines = np.random.default_rng(0), []
    for speaker in ("ann", "bob"):
        for index in range(6):
            name = f"{index}_{speaker}"
            soundfile.write(digits / f"{name}.wav", generator.normal(0, 0.1, 4_800), 8_000)
            row = {"id": name, "path": f"{name}.wav", "text": bench_digits.WORDS[index], "speaker": speaker}
            lines.append(json.dumps({**row, "index": index}) + "\n")
    (digits / "metadata.jsonl").write_text("".join(lines))
    simulated = [simulate(tmp_path / "simulated", utterances=30)]
    given = {"words": str(data), "digits": str(digits), "valid_speakers": 1, "overrides": TINY}
    found = bench_digits.run(tmp_path, lambda folder: simulated, **given)  # type: ignore[arg-type]
    for kind in ("all corpora", "one corpus"):
        for each in found["digits"][kind].values():
            assert each["clips"] == 12 and each["by_speaker"].keys() == {"ann", "bob"}
            assert each["mean"] == pytest.approx(np.mean(list(each["by_speaker"].values())))
    rates = found["wer"]
    assert rates["differences"]["student"]["value"] == pytest.approx(
        rates["all corpora"]["student"] - rates["one corpus"]["student"]
    )
    times = models(tmp_path)
    alone = bench_digits.run(tmp_path, lambda folder: simulated, ["student_alone"], **given)  # type: ignore[arg-type]
    assert models(tmp_path) == times
    for kind in ("all corpora", "one corpus"):
        assert alone["digits"][kind] == {"student_alone": found["digits"][kind]["student_alone"]}
    run_folder = tmp_path / "speech-digits-ann"
    speakers = {
        part: {json.loads(line)["speaker"] for line in (run_folder / "data" / f"{part}.jsonl").read_text().splitlines()}
        for part in ("train", "valid", "test")
    }
    assert "digits/ann" in speakers["test"] and "digits/bob" in speakers["train"] & speakers["valid"]
    assert "digits/ann" not in speakers["train"] | speakers["valid"] and "digits/bob" not in speakers["test"]


def test_runtime_measures_what_was_exported(data: Path, tmp_path: Path) -> None:
    given = {
        "data": str(data),
        "streams": 2,
        "stream_seconds": 1.0,
        "hour": 5.0,
        "repeats": 1,
        "overrides": TINY,
    }
    found = bench_runtime.run(tmp_path, **given)  # type: ignore[arg-type]
    folder = tmp_path / f"speech-{data.name}-runtime" / "exported"
    small = {file.name: file.stat().st_size for file in folder.with_name("int8").iterdir()}
    size = found["size"]["student"]
    assert size["model_bytes"] == small["model.int8.onnx"] == (folder / "model.int8.onnx").stat().st_size
    assert size["int8_bytes"] == sum(small.values()) and "model.onnx" not in small
    test = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    seconds = sum(each["duration"] for each in test)
    for name, cost in found["commands"].items():
        assert cost["real_time_factor"] == pytest.approx(cost["cpu_seconds"] / cost["audio_seconds"])
        if "one file" not in name:
            assert cost["audio_seconds"] == pytest.approx(seconds, abs=0.01)
    rates = found["word_error_rate"]
    assert rates["int8 costs"] == pytest.approx(rates["int8"] - rates["fp32"]) and rates["fp32"] > 0
    assert found["sherpa_onnx"]["fp32"]["utterances"] == len(test)
    assert found["streaming"]["same_text_as_whole_files"] > 0.9
    assert found["chunks"].keys() == {"80", "640"}
    for each in found["chunks"].values():
        assert each["same_text"] > 0.9 and each["real_time_factor"] > 0
    served = found["server"]
    assert 0.8 * served["words"] < served["words_as_alone"] <= served["words"]
    assert served["final_ms"]["n"] == 2 and served["final_ms"]["p95"] > 0
    assert served["beyond_the_limit"]["refused"] == served["beyond_the_limit"]["tried"] > 0


def test_what_an_extra_brings() -> None:
    device = bench_commands.installed("ondevice")["distributions"]
    assert {"onnxruntime", "soundfile", "soxr"} <= device.keys() and "torch" not in device and "numpy" in device
    assert "torch" in bench_commands.installed("train")["distributions"]
    assert device["onnxruntime"] > 10


def test_a_command_that_fails_is_named() -> None:
    with pytest.raises(UserError, match="no_such_module"):
        bench_commands.ran(["-m", "no_such_module"])


def test_what_a_command_costs_is_its_own() -> None:
    held = np.ones(30_000_000)  # 240 MB that a child does not have
    small = bench_commands.ran(["-c", "print('said', flush=True); import time; time.sleep(0.3)"])
    assert small.output == "said\n" and small.peak_bytes < held.nbytes / 2
    # it sleeps behind what it says, which takes no processor
    assert 0 < small.first_seconds < small.seconds and 0 < small.cpu_seconds < small.seconds
    large = bench_commands.ran(["-c", "held = bytearray(200_000_000); print()"])
    assert 200_000_000 < large.peak_bytes < 300_000_000
