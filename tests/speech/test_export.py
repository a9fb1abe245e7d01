"""Exported students answer as PyTorch does, in onnxruntime and in sherpa-onnx; a folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
import yaml

from apps.speech.card import tail_seconds
from apps.speech.data.batches import padded
from apps.speech.decode.confidence import Calibration
from apps.speech.decode.ngram import write_arpa
from apps.speech.device.decoding import Decoding
from apps.speech.device.folder import INPUTS, OUTPUTS, ExportedFolder
from apps.speech.device.folder_check import Listener, check_folder, heard_text
from apps.speech.export import Clip, export, export_model, prove
from apps.speech.features import SAMPLE_RATE, SILENCE, fbank, with_tail
from apps.speech.models import StreamingModel, new_model
from apps.speech.models.base import output_lengths
from apps.speech.onnx_step import OnnxStep, SummedConvolution
from apps.speech.runtime import Recognizer
from apps.speech.text import TextRules
from apps.speech.units import Units, train_sentencepiece, train_words
from kdcore.config import UserError
from kdcore.onnx_export import ParityError
from tests.speech.small_runs import run as finish
from tests.speech.small_runs import small

AN4 = Path(os.environ.get("KD_DATA", "../shared/data")) / "speech" / "an4"
UNITS = Units(tuple("▁abcdefghijklmnopqrstuvwxyz"))
LITTLE = {"channels": (2, 4), "width": 16, "hidden": 12, "convolutions": 1, "layers": 2, "kernel": 3}
LITTLE_CONFORMER = {"channels": (2, 4), "width": 16, "heads": 2, "blocks": 2, "feed_forward": 16, "kernel": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("conv_rnn", LITTLE),
    "gru": ("conv_rnn", {**LITTLE, "cell": "gru", "chunk": 3}),
    "convolutional": ("conv_rnn", {**LITTLE, "layers": 0, "convolutions": 3, "chunk": 1}),
    "conformer": ("chunked_conformer", {**LITTLE_CONFORMER, "chunk": 4, "left_chunks": 2}),
}


def made(kind: str, options: dict[str, Any], classes: int = UNITS.blank + 1, seed: int = 0) -> StreamingModel:
    torch.manual_seed(seed)
    model = new_model(kind, classes, options)
    assert isinstance(model, StreamingModel)
    model.set_statistics(torch.linspace(-9, -6, 80), torch.linspace(2, 4, 80))
    # random weights say little of anything: larger ones make states and logits matter
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model.eval()


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    envelope = np.repeat(random.uniform(0, 0.3, int(seconds * 10) + 1), SAMPLE_RATE // 10)
    return (envelope * random.normal(0, 1, len(envelope))).astype(np.float32)[: int(seconds * SAMPLE_RATE)]


def noises(count: int = 3) -> list[Clip]:
    return [Clip(f"noise-{index}", noise(1.1 + 0.37 * index, index)) for index in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_in_onnxruntime_is_pytorch_on_the_whole(name: str, tmp_path: Path) -> None:
    model = made(*MODELS[name])
    export_model(model, UNITS, tmp_path / "out", noises(), name)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    window = int(about["window_size"])
    assert window == int(about["chunk_shift"]) == 4 * model.chunk_frames and about["vocab_size"] == "27"
    shapes = [[int(about[f"{cache}_dim{axis}"]) for axis in (1, 2, 3)] for cache in INPUTS[2:4]]
    for lengths in ([137], [64, 137, 5]):
        features = [fbank(noise(length / 100, length)) for length in lengths]
        whole = padded(features, SILENCE)
        whole = np.pad(whole, ((0, 0), (0, -whole.shape[1] % window), (0, 0)), constant_values=SILENCE)
        caches: list[np.ndarray] = [np.zeros((len(lengths), *shape), np.float32) for shape in shapes]
        caches.append(np.zeros(len(lengths), np.int64))
        parts = []
        for start in range(0, whole.shape[1], window):
            signal = np.ascontiguousarray(whole[:, start : start + window].transpose(0, 2, 1))
            given = (signal, np.full(len(lengths), window), *caches)
            log_probs, frames, *caches = session.run(list(OUTPUTS), dict(zip(INPUTS, given, strict=True)))
            assert frames.tolist() == [model.chunk_frames] * len(lengths)
            parts.append(log_probs)
        heard = np.concatenate(parts, 1)
        for row, each in zip(heard, features, strict=True):
            with torch.no_grad():
                logits = model(torch.from_numpy(each)[None], torch.tensor([len(each)]))[0]
            wanted = torch.log_softmax(logits, 1).numpy()
            np.testing.assert_allclose(row[: len(wanted)], wanted, atol=1e-4)
    assert all(finding.ok for finding in check_folder(tmp_path / "out"))


@pytest.mark.parametrize(
    ("kind", "size", "limit"),
    [("conv_rnn", "small", 1_100_000), ("conv_rnn", "tiny", 450_000)],
)
def test_int8_is_as_small_as_promised(kind: str, size: str, limit: int, tmp_path: Path) -> None:
    export_model(made(kind, {"size": size}), UNITS, tmp_path / "out", noises(1), size)
    sizes = {
        name: (tmp_path / "out" / name).stat().st_size for name in ("model.int8.onnx", "tokens.txt", "kdsuite.json")
    }
    assert sum(sizes.values()) <= limit, sizes


def test_a_gru_is_int8_too(tmp_path: Path) -> None:
    export_model(made("conv_rnn", {**LITTLE, "hidden": 128, "cell": "gru"}), UNITS, tmp_path / "out", noises(1), "gru")
    float32, int8 = ((tmp_path / "out" / name).stat().st_size for name in ("model.onnx", "model.int8.onnx"))
    assert int8 < 0.4 * float32


def test_a_convolution_of_single_channels_is_a_sum() -> None:
    torch.manual_seed(0)
    layer, frames = torch.nn.Conv1d(6, 6, 3, groups=6), torch.randn(2, 6, 9)
    torch.testing.assert_close(SummedConvolution(layer)(frames), layer(frames))
    with pytest.raises(ValueError, match="neither padding"):
        SummedConvolution(torch.nn.Conv1d(6, 6, 3, groups=6, padding=1))


def test_what_the_folder_says_of_itself(tmp_path: Path) -> None:
    model = made(*MODELS["conformer"])
    clips = [*noises(), Clip("with text", noise(1.5, 9), "a text")]
    given = {"calibration": Calibration(1.5, -0.25), "delay_ms": 80, "decode": {"lm_weight": 1.0}}
    export_model(model, UNITS, tmp_path / "out", clips, "little", **given)
    folder = ExportedFolder.open(tmp_path / "out", verify=True)
    assert (folder.name, folder.kind, folder.units) == ("little", "chunked_conformer", "characters")
    assert folder.parameters == model.parameter_count() and folder.symbols == UNITS.symbols
    assert (folder.window_size, folder.chunk_ms, folder.look_ahead_ms) == (16, 160, model.look_ahead_ms)
    assert folder.delay_ms == 80 and folder.confidence == {"slope": 1.5, "offset": -0.25}
    assert folder.decode == {"lm_weight": 1.0} and folder.text == TextRules()
    assert set(folder.files) == {"model.onnx", "model.int8.onnx", "tokens.txt", "README.md", "self_test.wav"}
    assert folder.extra_files() == []
    about = soundfile.info(tmp_path / "out" / "self_test.wav")
    assert (about.samplerate, about.channels, about.subtype) == (16_000, 1, "PCM_16")
    samples, _ = soundfile.read(tmp_path / "out" / "self_test.wav", dtype="float32")
    for name, text in folder.self_test["text"].items():
        assert heard_text(Listener(tmp_path / "out" / name, 16), samples, folder.symbols) == text
    assert folder.self_test["text"]["model.onnx"]


def test_pieces_need_no_sentencepiece_on_the_device(tmp_path: Path) -> None:
    units = train_sentencepiece(["yes no go stop yes yes no", "no go stop go go go"], 14)
    export_model(made("conv_rnn", LITTLE, units.blank + 1), units, tmp_path / "out", noises(1), "pieces")
    folder = ExportedFolder.open(tmp_path / "out")
    assert folder.units == "pieces" and folder.symbols == units.symbols
    assert not (tmp_path / "out" / "sentencepiece.model").exists()


def test_texts_are_normalised_as_those_of_training(tmp_path: Path) -> None:
    units, rules = Units.of_characters(["YES No"]), TextRules(lower=False)
    export_model(made("conv_rnn", LITTLE, units.blank + 1), units, tmp_path / "out", noises(1), "cased", text=rules)
    assert ExportedFolder.open(tmp_path / "out").text == rules
    hot = Decoding(hot_words={"YES, No!": 2.0}, grammar=("No",))
    assert Recognizer(tmp_path / "out", decoding=hot).symbols.normalise("YES, No!") == "YES No"
    with pytest.raises(UserError, match="'y' is not among"):
        Recognizer(tmp_path / "out", decoding=Decoding(hot_words={"yes": 2.0}))
    # an export of an earlier version says nothing of them
    about = json.loads((tmp_path / "out" / "kdsuite.json").read_text())
    del about["text"]
    (tmp_path / "out" / "kdsuite.json").write_text(json.dumps(about))
    assert ExportedFolder.open(tmp_path / "out").text == TextRules()
    (tmp_path / "out" / "kdsuite.json").write_text(json.dumps({**about, "text": {"lower": False}}))
    with pytest.raises(UserError, match=r"kdsuite\.json: text: got .*wanted true or false for each of lower, strip"):
        ExportedFolder.open(tmp_path / "out")


def test_whole_words_are_hot_words_and_grammars(tmp_path: Path) -> None:
    units = train_words(["yes no stop", "no yes"])
    export_model(made("conv_rnn", LITTLE, units.blank + 1), units, tmp_path / "out", noises(1), "words")
    write_arpa(tmp_path / "lm.arpa", ["yes no stop", "no yes maybe"], 2)
    grammar = Recognizer(tmp_path / "out", decoding=Decoding(grammar=("yes", "stop"), hot_words={"stop yes": 2.0}))
    said = [segment.text for update in grammar.transcribe([noise(2.0)]) for segment in update.final]
    assert set(" ".join(said).split()) <= {"yes", "stop"}
    lm = Recognizer(tmp_path / "out", decoding=Decoding(lm=tmp_path / "lm.arpa"))
    assert lm.decoder.left_out == ("maybe",)
    with pytest.raises(UserError, match="'maybe' is not among"):
        Recognizer(tmp_path / "out", decoding=Decoding(hot_words={"maybe": 1.0}))


def test_another_model_is_no_parity(tmp_path: Path) -> None:
    kind, options = MODELS["lstm"]
    model, other = made(kind, options), made(kind, options, seed=1)
    export_model(model, UNITS, tmp_path / "out", noises(1), "one")
    features = [fbank(noise(1.0))]
    path = tmp_path / "out" / "model.onnx"
    assert prove(model, OnnxStep(model), path, features) < 1e-4
    with pytest.raises(ParityError, match=r"model\.onnx: output logprobs: onnxruntime differs from PyTorch"):
        prove(other, OnnxStep(other), path, features)
    with pytest.raises(ParityError, match="a stream differs from PyTorch on the whole utterance"):
        prove(other, OnnxStep(model), path, features)


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    model, out = made(*MODELS["lstm"]), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds files that no export wrote"):
        export_model(model, UNITS, out, noises(1), "one")
    assert [each.name for each in tmp_path.rglob("*")] == ["out", "thesis.txt"]
    with pytest.raises(UserError, match="is a file, wanted a folder"):
        export_model(model, UNITS, out / "thesis.txt", noises(1), "one")


def test_an_export_gives_way_to_a_whole_one_only(tmp_path: Path) -> None:
    model, out = made(*MODELS["lstm"]), tmp_path / "out"
    export_model(model, UNITS, out, noises(1), "one")
    before = {each.name: each.read_bytes() for each in out.iterdir()}

    def broken() -> Iterator[Clip]:
        yield from noises(1)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        export_model(model, UNITS, out, broken(), "two")
    assert {each.name: each.read_bytes() for each in out.iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    export_model(model, UNITS, out, noises(1), "one")
    assert {each.name: each.read_bytes() for each in out.iterdir()} == before  # the same bytes
    export_model(model, UNITS, out, noises(1), "two")
    assert ExportedFolder.open(out).name == "two" and [each.name for each in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="clips: got none"):
        export_model(model, UNITS, out, [], "three")


def test_error_rates_of_both_models_are_those_of_their_texts(tmp_path: Path) -> None:
    model, clips = made(*MODELS["lstm"]), noises(2)
    export_model(model, UNITS, tmp_path / "one", clips, "one")
    folder = ExportedFolder.open(tmp_path / "one")
    listener = Listener(tmp_path / "one" / "model.onnx", folder.window_size)
    texts = [heard_text(listener, np.round(clip.samples * 32768) / np.float32(32768), folder.symbols) for clip in clips]
    right = [Clip(clip.name, clip.samples, text) for clip, text in zip(clips, texts, strict=True)]
    export_model(model, UNITS, tmp_path / "two", right, "two")
    card = (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in card.splitlines() if line.startswith("| `model.onnx`"))
    assert row.endswith("| 2 of 2 | 0.0 |"), row


# -- a finished run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("espeakng_loader")
    from data_scripts.simulate_speech import simulate

    root = tmp_path_factory.mktemp("run")
    pipeline = small("demo", simulate(root / "data", utterances=24), root)
    finish(pipeline)
    return pipeline.run.path


def test_a_run_becomes_a_folder_with_its_card(run_folder: Path, tmp_path: Path) -> None:
    assert export(run_folder, "student", tmp_path / "out", name="simulated student") == tmp_path / "out"
    folder = ExportedFolder.open(tmp_path / "out", verify=True)
    assert folder.name == "simulated student" and folder.decode["beam"] == 4
    calibration = run_folder / "student" / "calibration.json"
    assert (folder.confidence is None) == (not calibration.exists())
    assert folder.delay_ms == json.loads((run_folder / "student" / "delay.json").read_text())["delay_ms"]
    if folder.confidence:
        assert folder.confidence["slope"] == json.loads(calibration.read_text(encoding="utf-8"))["scale"]
    # a later evaluation writes beside the model of the seed
    (of_seed,) = run_folder.glob("seeds/*/student")
    with_lm = of_seed / "calibration_lm.json"
    kept = with_lm.read_bytes() if with_lm.exists() else None
    with_lm.write_text(json.dumps({"scale": 0.7, "offset": -1.0}), encoding="utf-8")
    try:
        again = ExportedFolder.open(export(run_folder, "student", tmp_path / "again"))
    finally:
        with_lm.unlink() if kept is None else with_lm.write_bytes(kept)
    assert again.confidence_lm == {"slope": 0.7, "offset": -1.0} and again.confidence == folder.confidence
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    rows = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    for role, title in (("teacher", "teacher"), ("student_alone", "student alone"), ("student", r"\*\*student\*\*")):
        (wer,) = [row["metrics"]["wer"] for row in rows if row["role"] == role and row["split"] == "test"]
        assert re.search(rf"^\| {title} \| .* \| best path \| {100 * wer:.1f} \|", card, re.MULTILINE), card
    assert "are simulated" in card and "how well any of them hears people was not measured" in card
    assert "The data states no licence." in card and "recipe `demo`" in card
    assert all(finding.ok for finding in check_folder(tmp_path / "out"))


def test_one_model_alone_is_a_small_folder(run_folder: Path, tmp_path: Path) -> None:
    both, one = (
        export(run_folder, "student", tmp_path / name, only=only) for name, only in (("a", None), ("b", "int8"))
    )
    folder = ExportedFolder.open(one, verify=True)
    assert folder.models == ("model.int8.onnx",) and not (one / "model.onnx").exists()
    assert (one / "model.int8.onnx").read_bytes() == (both / "model.int8.onnx").read_bytes()
    assert "`model.onnx`" not in (one / "README.md").read_text(encoding="utf-8")
    assert all(finding.ok for finding in check_folder(one))
    with pytest.raises(UserError, match="was not exported"):
        Recognizer(one, int8=False)


def test_the_chunk_is_chosen_where_the_text_does_not_depend_on_it(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = {}
    clip = noise(3.0)
    for chunk_ms in (40, 160, 640):
        out = export(run_folder, "student", tmp_path / str(chunk_ms), chunk_ms=chunk_ms)
        about = ExportedFolder.open(out)
        frames = chunk_ms // 10
        assert (about.chunk_ms, about.window_size, about.look_ahead_ms) == (chunk_ms, frames, 0)
        card = (out / "README.md").read_text(encoding="utf-8")
        assert f"| chunk | {chunk_ms} ms" in card and "A right word appears" not in card
        assert (
            len(re.findall(r"^\| student − teacher \| best path .* (?:utterances|speakers) \|", card, re.MULTILINE))
            == 2
        )
        assert all(found.ok for found in check_folder(out))
        heard[chunk_ms] = Listener(out / "model.onnx", frames).hear(fbank(clip))
    for other in (40, 640):
        np.testing.assert_allclose(heard[other], heard[160], atol=1e-4)
    for wrong in (0, 100, 4000):
        with pytest.raises(UserError, match=f"--chunk-ms: got {wrong}, wanted a multiple of 40"):
            export(run_folder, "student", tmp_path / "none", chunk_ms=wrong)
    conformer = made(*MODELS["conformer"])
    monkeypatch.setattr("apps.speech.export.load_model", lambda folder: (conformer, UNITS))
    with pytest.raises(UserError, match=r"got 80, but chunked_conformer .* was trained in those of 160 ms"):
        export(run_folder, "student", tmp_path / "none", chunk_ms=80)
    assert not (tmp_path / "none").exists()
    # trained in several, it takes any of them, and what was measured in another is not said of it
    conformer.options = replace(conformer.options, chunk=4, chunks=(2, 4))
    out = export(run_folder, "student", tmp_path / "two", chunk_ms=80)
    about, card = ExportedFolder.open(out), (out / "README.md").read_text(encoding="utf-8")
    assert (about.chunk_ms, about.window_size, about.look_ahead_ms) == (80, 8, 40)
    assert "intervals by bootstrap" not in card and "student − teacher" not in card
    assert all(found.ok for found in check_folder(out))


def test_a_run_of_an_earlier_version_is_exported(run_folder: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(run_folder, older)
    settings = yaml.safe_load((older / "config.yaml").read_text(encoding="utf-8"))
    for each in settings["knowledge"].values():
        del each["fade"]  # which it did not know yet
    (older / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    one, other = (export(run, "student", tmp_path / run.name / "out", name="run") for run in (older, run_folder))
    assert (one / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()


def test_a_teacher_is_not_exported(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hears whole utterances; wanted --model student or student_alone"):
        export(run_folder, "teacher", tmp_path / "out")
    with pytest.raises(UserError, match="no run here"):
        export(tmp_path, "student", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- sherpa-onnx -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A student that overfits short recordings of AN4, its folder, and recordings it did not see."""

    folder: Path
    clips: list[Clip]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    if not (AN4 / "train.jsonl").exists():
        pytest.skip(f"{AN4} is not there (KD_DATA)")
    pytest.importorskip("sherpa_onnx")
    clips, out = _an4("train", 1.8)[:40], tmp_path_factory.mktemp("trained") / "out"
    export_model(_overfit(clips, UNITS), UNITS, out, clips[:8], "an4")
    return Trained(out, [*clips, *_an4("test", 4.0)[:60]])


def _an4(part: str, longest: float) -> list[Clip]:
    rows = [json.loads(line) for line in (AN4 / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = sorted((row for row in rows if row["duration"] < longest), key=lambda row: str(row["id"]))
    return [
        Clip(row["id"], soundfile.read(AN4 / row["audio_filepath"], dtype="float32")[0], row["text"]) for row in kept
    ]


def _overfit(clips: list[Clip], units: Units) -> StreamingModel:
    torch.manual_seed(0)
    options = {"channels": (4, 8), "width": 64, "convolutions": 1, "hidden": 96, "layers": 1, "dropout": 0.0}
    model = new_model("conv_rnn", units.blank + 1, options)
    assert isinstance(model, StreamingModel)
    features = [fbank(with_tail(clip.samples)) for clip in clips]
    frames = torch.from_numpy(np.concatenate(features))
    model.set_statistics(frames.mean(0), frames.std(0))
    labels = [torch.tensor(units.encode(clip.text or "")) for clip in clips]
    optimizer = torch.optim.AdamW(model.parameters(), 8e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=240)
    random = np.random.default_rng(0)
    for _ in range(240):
        rows = random.permutation(len(clips))[:12]
        lengths = torch.tensor([len(features[row]) for row in rows])
        logits = model(torch.from_numpy(padded([features[row] for row in rows], SILENCE)), lengths)
        targets = [labels[row] for row in rows]
        loss = torch.nn.functional.ctc_loss(
            torch.log_softmax(logits, 2).transpose(0, 1),
            torch.cat(targets),
            output_lengths(lengths),
            torch.tensor([len(each) for each in targets]),
            blank=units.blank,
            zero_infinity=True,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def sherpa(folder: Path, name: str) -> Any:
    import sherpa_onnx

    return sherpa_onnx.OnlineRecognizer.from_nemo_ctc(
        tokens=str(folder / "tokens.txt"), model=str(folder / name), num_threads=1
    )


def sherpa_text(recognizer: Any, samples: np.ndarray, tail: float) -> str:
    stream = recognizer.create_stream()
    stream.accept_waveform(SAMPLE_RATE, np.concatenate([samples, np.zeros(int(tail * SAMPLE_RATE), np.float32)]))
    stream.input_finished()
    while recognizer.is_ready(stream):
        recognizer.decode_stream(stream)
    return " ".join(recognizer.get_result(stream).split())


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_sherpa_onnx_hears_the_same(trained: Trained, name: str) -> None:
    folder = ExportedFolder.open(trained.folder)
    listener, recognizer = Listener(trained.folder / name, folder.window_size), sherpa(trained.folder, name)
    ours = [heard_text(listener, clip.samples, folder.symbols) for clip in trained.clips]
    theirs = [sherpa_text(recognizer, clip.samples, tail_seconds(folder.chunk_ms)) for clip in trained.clips]
    right = [text == clip.text for text, clip in zip(ours, trained.clips, strict=True)]
    # texts that say something
    assert len(ours) == 100 and len(set(ours)) >= 50 and sum(right[:40]) >= 20, ours[:40]
    different = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    assert len(different) <= 0.01 * len(ours), different


def test_without_a_tail_sherpa_onnx_loses_last_words(trained: Trained) -> None:
    folder, recognizer = ExportedFolder.open(trained.folder), sherpa(trained.folder, "model.onnx")
    listener = Listener(trained.folder / "model.onnx", folder.window_size)
    clips = trained.clips[:40]
    ours = [heard_text(listener, clip.samples, folder.symbols) for clip in clips]
    assert sum(sherpa_text(recognizer, clip.samples, 0.0) != text for clip, text in zip(clips, ours, strict=True)) > 0


def test_the_program_in_the_card_runs(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (trained.folder / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(trained.folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(program, "card", "exec"), {})
    assert said.getvalue().strip() == ExportedFolder.open(".").self_test["text"]["model.int8.onnx"]


def test_sherpa_onnx_gives_models_the_features_they_were_trained_on(tmp_path: Path) -> None:
    pytest.importorskip("sherpa_onnx")
    wanted = fbank(noise(2.0))
    for bin_ in (0, 20, 79):
        values = _echoed(tmp_path, bin_, noise(2.0))
        np.testing.assert_allclose(values, wanted[: len(values), bin_], atol=0.051)


def _echoed(folder: Path, bin_: int, samples: np.ndarray) -> np.ndarray:
    """Return one feature of each frame, to a tenth, as sherpa-onnx gives it to a model that says what it is given.

    Class 2 v + p stands for the value v / 10 - 16; p is the frame's parity, so that no class repeats.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    classes, node = 513, helper.make_node
    constants = {
        "bin": np.array([bin_]),
        "axis": np.array([1]),
        "sixteen": np.float32(16),
        "ten": np.float32(10),
        "least": np.float32(0),
        "most": np.float32(254),
        "two": np.float32(2),
        "parity": (np.arange(16, dtype=np.float32) % 2)[None],
        "classes": np.array(classes),
        "values": np.array([-20, 0], np.float32),
    }
    nodes = [
        node("Gather", ["audio_signal", "bin"], ["row"], axis=1),
        node("Squeeze", ["row", "axis"], ["value"]),
        node("Add", ["value", "sixteen"], ["shifted"]),
        node("Mul", ["shifted", "ten"], ["tenths"]),
        node("Round", ["tenths"], ["whole"]),
        node("Clip", ["whole", "least", "most"], ["clipped"]),
        node("Mul", ["clipped", "two"], ["doubled"]),
        node("Add", ["doubled", "parity"], ["class"]),
        node("Cast", ["class"], ["index"], to=TensorProto.INT64),
        node("OneHot", ["index", "classes", "values"], ["logprobs"]),
        node("Identity", ["length"], ["encoded_lengths"]),
        *(node("Identity", [name], [f"{name}_next"]) for name in INPUTS[2:]),
    ]
    floats, whole = TensorProto.FLOAT, TensorProto.INT64
    inputs = [("audio_signal", floats, ["N", 80, 16]), ("length", whole, ["N"])]
    caches = [("cache_last_channel", floats, ["N", 1, 1, 1]), ("cache_last_time", floats, ["N", 1, 1, 1])]
    caches.append(("cache_last_channel_len", whole, ["N"]))
    outputs = [("logprobs", floats, ["N", 16, classes]), ("encoded_lengths", whole, ["N"])]
    outputs += [(f"{name}_next", kind, shape) for name, kind, shape in caches]
    graph = helper.make_graph(
        nodes,
        "echo",
        [helper.make_tensor_value_info(*each) for each in (*inputs, *caches)],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    about = {"window_size": 16, "chunk_shift": 16, "subsampling_factor": 4, "vocab_size": classes - 1}
    about |= {f"{cache}_dim{axis}": 1 for cache in INPUTS[2:4] for axis in (1, 2, 3)}
    for key, value in {**about, "model_type": "EncDecCTCModelBPE", "normalize_type": ""}.items():
        model.metadata_props.add(key=key, value=str(value))
    onnx.save(model, folder / "echo.onnx")
    lines = [f"t{index}, {index}\n" for index in range(classes - 1)]
    (folder / "tokens.txt").write_text("".join([*lines, f"<blk> {classes - 1}\n"]), encoding="utf-8")
    text = sherpa_text(sherpa(folder, "echo.onnx"), samples, 0.0)
    found = np.array([int(each.strip()[1:]) for each in text.split(",") if each.strip()])
    assert (np.diff(found % 2) != 0).all() and len(found) > 100
    return (found // 2) / 10 - 16
