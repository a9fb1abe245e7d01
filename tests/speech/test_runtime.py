from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.decode.greedy import greedy
from apps.speech.decode.ngram import write_arpa
from apps.speech.device.vad import GateOptions
from apps.speech.features import fbank
from apps.speech.runtime import Decoding, Recognizer, Rule, Segment, Stream
from kdcore.config import UserError
from tests.speech.device.exported import CHUNK, SYMBOLS, export_tones, noise, silence, spoken, tone, with_tail

WORDS = ("yes", "no", "on", "and", "day", "sad", "annoy", "eddy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tones(tmp_path_factory.mktemp("exported") / "tones")


@pytest.fixture(scope="module")
def recognizer(folder: Path) -> Recognizer:
    return Recognizer(folder)


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Recognizer, onnxruntime.InferenceSession]:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return Recognizer(folder, endpoint=None), session


def segments(recognizer: Recognizer, samples: np.ndarray, edges: list[int] | None = None) -> list[Segment]:
    stream = recognizer.stream()
    found: list[Segment] = []
    for first, last in pairwise([0, *sorted(edges or []), len(samples)]):
        found += stream.accept(samples[first:last]).final
    return found + list(stream.finish().final)


def text(recognizer: Recognizer, samples: np.ndarray) -> str:
    return " ".join(segment.text for segment in segments(recognizer, samples))


def offline(session: onnxruntime.InferenceSession, samples: np.ndarray) -> str:
    """Greedy decoding of an ONNX model, window by window, of the features of the whole audio."""
    features = fbank(with_tail(samples))
    names = [each.name for each in session.get_inputs()]
    state = [np.zeros((1, *each.shape[1:]), np.float32) for each in session.get_inputs()[2:4]]
    state.append(np.zeros(1, np.int64))
    parts, size = [], 4 * CHUNK
    for first in range(0, len(features) - size + 1, size):
        window = np.ascontiguousarray(features[None, first : first + size].transpose(0, 2, 1))
        out = session.run(None, dict(zip(names, [window, np.array([size]), *state], strict=True)))
        parts.append(out[0][0])
        state = out[2:]
    ids = greedy(np.concatenate(parts)).ids
    return " ".join("".join(SYMBOLS[index] for index in ids).replace("▁", " ").split())


@settings(max_examples=15, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6),
    level=st.sampled_from([0.0, 1e-3, 0.05]),
    before=st.floats(0, 0.5),
    after=st.floats(0, 0.3),
    data=st.data(),
)
def test_any_split_says_what_the_model_says_offline(
    whole: tuple[Recognizer, onnxruntime.InferenceSession],
    words: list[str],
    level: float,
    before: float,
    after: float,
    data: st.DataObject,
) -> None:
    recognizer, session = whole
    samples = spoken(" ".join(words), before=before, after=after)
    samples = samples + noise(len(samples) / 16_000, level)[: len(samples)]
    edges = data.draw(st.lists(st.integers(0, len(samples)), max_size=12))
    found = segments(recognizer, samples, edges)
    assert " ".join(segment.text for segment in found) == offline(session, samples)
    assert found == segments(recognizer, samples)  # times and confidences too


def test_words_have_times_and_calibrated_confidences(recognizer: Recognizer) -> None:
    (segment,) = segments(recognizer, spoken("yes no", before=0.4))
    assert [word["word"] for word in segment.words] == ["yes", "no"]
    assert segment.text == "yes no"
    # y from 0.40 s, s until 0.96 s; the boundary; n from 1.28 s
    for word, (start, end) in zip(segment.words, [(0.4, 0.96), (1.28, 1.62)], strict=True):
        assert abs(word["start"] - start) <= 0.08
        assert abs(word["end"] - end) <= 0.12
        assert 0.5 < word["confidence"] < 1.0
    assert (segment.start, segment.end) == (segment.words[0]["start"], segment.words[-1]["end"])


def test_words_of_a_lexicon_have_a_calibration_of_their_own(folder: Path, tmp_path: Path) -> None:
    def confidences(source: Path, decoding: Decoding) -> list[float]:
        found = segments(Recognizer(source, decoding=decoding), spoken("yes no", before=0.4))
        return [word["confidence"] for segment in found for word in segment.words]

    write_arpa(tmp_path / "lm.arpa", ["yes no"], 2)
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    about = json.loads((both / "kdsuite.json").read_text(encoding="utf-8"))
    about["confidence_lm"] = {"slope": 0.5, "offset": -3.0}
    (both / "kdsuite.json").write_text(json.dumps(about), encoding="utf-8")
    for decoding in (Decoding(), Decoding(beam=4), Decoding(hot_words={"yes": 1.0})):
        assert confidences(both, decoding) == confidences(folder, decoding)
    for decoding in (Decoding(grammar=("yes", "no")), Decoding(lm=tmp_path / "lm.arpa")):
        own, other = confidences(both, decoding), confidences(folder, decoding)
        assert len(own) == len(other) == 2
        # a folder of an earlier version has one calibration for all
        assert all(one < 0.5 < two for one, two in zip(own, other, strict=True))


def test_the_last_word_is_heard_although_the_audio_ends_with_it(recognizer: Recognizer) -> None:
    samples = spoken("yes no", rest=0.02, after=0.0)
    samples = samples[: np.flatnonzero(np.abs(samples) > 0.01)[-1]]
    (segment,) = segments(recognizer, samples)
    assert segment.text == "yes no"
    assert segment.end <= len(samples) / 16_000


def check_times(found: list[Segment], seconds: float) -> None:
    """Every word takes time, none before the one in front of it ends, and none behind the audio."""
    before = 0.0
    for word in (word for segment in found for word in segment.words):
        assert before <= word["start"] < word["end"] <= seconds
        before = word["end"]
    for segment in found:
        assert (segment.start, segment.end) == (segment.words[0]["start"], segment.words[-1]["end"])


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 40_000), edges=st.lists(st.integers(0, 40_000), max_size=3))
def test_audio_cut_within_a_word_gives_it_time(recognizer: Recognizer, cut: int, edges: list[int]) -> None:
    samples = spoken("yes no day", before=0.0, rest=0.04)[:cut]
    check_times(segments(recognizer, samples, [min(edge, len(samples)) for edge in edges]), len(samples) / 16_000)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60) | st.integers(1, 30_000),
    heard=st.lists(st.sampled_from([0, 1, len(SYMBOLS)]), min_size=4, max_size=60),
    pause=st.sampled_from([0.08, 0.4]),
    together=st.booleans(),
)
def test_words_that_come_behind_the_audio_share_what_is_left_of_it(
    folder: Path, count: int, heard: list[int], pause: float, together: bool
) -> None:
    # a network that says so much in each frame, whatever it hears, also in the silence at the end
    frames = np.full((1000, len(SYMBOLS) + 1), -12.0, np.float32)
    frames[np.arange(1000), np.resize(heard, 1000)] = -1e-4
    rules = (Rule(True, pause, 0.0), Rule(False, 0.0, 0.8))
    stream = Recognizer(folder, endpoint=rules).stream()
    stream.queue(silence(count / 16_000))
    found, place = [], 0
    for step in (lambda: None, stream.end):
        step()
        while stream.ready:
            stream.next_window()
            stream.hear(frames[place : place + CHUNK], stream.state)
            place += CHUNK
            found += [] if together else stream.take().final
        found += stream.take().final
    check_times(found, count / 16_000)


def test_partials_grow_and_finals_stay(recognizer: Recognizer) -> None:
    samples = np.concatenate([spoken("yes no"), silence(1.5), spoken("day")])
    stream = recognizer.stream()
    updates = [stream.accept(packet) for packet in np.array_split(samples, 60)] + [stream.finish()]
    assert [segment.text for update in updates for segment in update.final] == ["yes no", "day"]
    shown = [update.partial for update in updates]
    assert "ye" in shown and "yes n" in shown
    assert shown[-1] == ""


def test_silence_and_nothing_say_nothing(recognizer: Recognizer) -> None:
    for samples in (np.zeros(0, np.float32), silence(0.01), silence(7), noise(3, 0.02)):
        assert segments(recognizer, samples) == []


def test_a_stream_refuses_what_is_no_audio(recognizer: Recognizer) -> None:
    stream = recognizer.stream()
    for bad in (np.zeros(4), np.zeros((2, 2), np.float32), np.array([np.nan], np.float32), [0.0]):
        with pytest.raises(ValueError, match="samples"):
            stream.accept(bad)  # type: ignore[arg-type]
    stream.finish()
    with pytest.raises(ValueError, match="finished"):
        stream.accept(silence(0.1))
    with pytest.raises(ValueError, match="finished"):
        stream.finish()


def test_many_streams_in_one_run_are_each_as_alone(recognizer: Recognizer) -> None:
    audio = [spoken(" ".join(WORDS[: count + 1]), before=0.1 * count) for count in range(5)]
    streams = [recognizer.stream() for _ in audio]
    said: list[list[Segment]] = [[] for _ in audio]
    sizes = []
    for packet in range(40):
        for stream, samples in zip(streams, audio, strict=True):
            stream.queue(samples[packet * 4000 : (packet + 1) * 4000])
        while count := recognizer.step_many(streams):
            sizes.append(count)
        for place, stream in enumerate(streams):
            said[place] += stream.take().final
    for stream in streams:
        stream.end()
    while recognizer.step_many(streams):
        pass
    for place, stream in enumerate(streams):
        assert stream.ready == 0
        said[place] += stream.take().final
    assert said == [segments(recognizer, samples) for samples in audio]
    assert max(sizes) == 5


def test_threads_share_a_recogniser(recognizer: Recognizer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    audio = [spoken(word) for word in WORDS] * 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda samples: text(recognizer, samples), audio)) == [*WORDS] * 3


def test_hot_words_grammar_and_language_model(folder: Path, tmp_path: Path) -> None:
    # the boundary is too faint to be heard unless it is expected
    samples = np.concatenate([spoken("on", after=0.0), 0.2 * tone("▁", 0.2), spoken("no", before=0.1)])
    assert text(Recognizer(folder), samples) == "onno"
    assert text(Recognizer(folder, decoding=Decoding(beam=8)), samples) == "onno"
    assert text(Recognizer(folder, decoding=Decoding(hot_words={"On, no!": 8.0})), samples) == "on no"
    closed = Recognizer(folder, decoding=Decoding(grammar=("YES", "no")))
    assert text(closed, spoken("yes no yes")) == "yes no yes"
    assert "on" not in text(closed, spoken("on")).split()
    arpa = tmp_path / "lm.arpa"
    write_arpa(arpa, ["yes no", "no day", "zzz yes"], 2)
    model = Recognizer(folder, decoding=Decoding(lm=arpa, lm_weight=0.5))
    assert text(model, spoken("yes no day")) == "yes no day"
    assert model.decoder.left_out == ("zzz",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hot_words": {"zebra": 3.0}}, "'zebra' cannot be spelled"),
        ({"hot_words": {"yes": -1.0}}, "boost of 'yes'"),
        ({"hot_words": {"!": 3.0}}, "wanted a phrase"),
        ({"grammar": ("...",)}, "grammar: got no words"),
        ({"grammar": ("zoo",)}, "'zoo' cannot be spelled"),
        ({"lm": Path("no.arpa")}, "no.arpa"),
        ({"beam": 0}, "beam: got 0"),
        ({"grammar": ("yes",), "word_score": 1000.0}, "word_score: got 1000, wanted -50 to 50"),
        ({"lm": Path("no.arpa"), "lm_weight": -51.0}, "lm_weight: got -51, wanted -50 to 50"),
    ],
)
def test_bad_settings(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recognizer(folder, decoding=Decoding(**options))  # type: ignore[arg-type]


def test_the_strongest_settings_are_numbers(folder: Path, tmp_path: Path) -> None:
    arpa = tmp_path / "lm.arpa"
    write_arpa(arpa, ["yes no", "no day", "day"], 2)
    text_of = arpa.read_text(encoding="utf-8")
    # as SRILM writes a word that is never said but in its place
    arpa.write_text(re.sub(r"^-[\d.]+\tno\t", "-99\tno\t", text_of, flags=re.MULTILINE), encoding="utf-8")
    phrases = [" ".join(("no", *["yes"] * more)) for more in range(20)][::-1]
    decoding = Decoding(lm=arpa, lm_weight=50.0, word_score=50.0, hot_words=dict.fromkeys(phrases, 50.0))
    assert text(Recognizer(folder, decoding=decoding), spoken("yes no day"))
    nested = {" ".join(["yes"] * more): 50.0 for more in range(1, 20)}
    assert text(Recognizer(folder, decoding=Decoding(hot_words=nested)), spoken("yes yes " * 8)).startswith("yes yes")


def test_nobody_pauses_and_still_no_word_is_cut_lost_or_said_twice(folder: Path) -> None:
    said = [WORDS[place % len(WORDS)] for place in range(30)]
    samples = spoken(" ".join(said), rest=0.08)
    rules = (Rule(True, 1.2, 0.0), Rule(False, 0.0, 5.0))
    for decoding in (Decoding(), Decoding(beam=8), Decoding(grammar=WORDS)):
        found = segments(Recognizer(folder, decoding=decoding, endpoint=rules), samples)
        assert len(found) > 5
        assert [word["word"] for segment in found for word in segment.words] == said
        assert all(segment.end - segment.start <= 5.0 for segment in found)
        times = [time for segment in found for word in segment.words for time in (word["start"], word["end"])]
        assert times == sorted(times)
        assert found == segments(Recognizer(folder, decoding=decoding, endpoint=rules), samples, [1000, 50_000])


def test_a_model_that_starts_afresh_at_every_short_pause_loses_nothing(folder: Path) -> None:
    said = ["yes", "no", "day", "sad"]
    samples = np.concatenate([np.concatenate([spoken(each), silence(0.37 * place)]) for place, each in enumerate(said)])
    for pause in (0.16, 0.24, 0.48, 0.52):
        rules = (Rule(False, pause, 0.0),)
        found = segments(Recognizer(folder, endpoint=rules), np.concatenate([silence(3), samples, silence(3)]), [77])
        assert " ".join(segment.text for segment in found).split() == said


def test_the_gate_leaves_out_silence_and_no_word(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["yes no", "day", "sad and annoy", "eddy on"]
    audio = np.concatenate([part for each in said for part in (spoken(each), silence(9))])
    audio = audio + noise(len(audio) / 16_000, 1e-3)[: len(audio)]
    steps: list[int] = []
    gated = Recognizer(folder, gate=GateOptions())
    step = gated.network.step

    def counted(windows: list[np.ndarray], states: list[object]) -> object:
        steps.append(len(windows))
        return step(windows, states)  # type: ignore[arg-type]

    monkeypatch.setattr(gated.network, "step", counted)
    words = [segment.words for segment in segments(gated, audio)]
    assert words == [segment.words for segment in segments(Recognizer(folder), audio)]
    assert [" ".join(word["word"] for word in each) for each in words] == said
    assert sum(steps) < 0.6 * len(audio) / (160 * 4 * CHUNK)
    assert segments(gated, audio, [7, 90_001, 90_001, 300_000]) == segments(gated, audio)


_LONG = """
import resource, sys
import numpy as np
from apps.speech.runtime import Recognizer
from tests.speech.device.exported import silence, spoken
minute = np.concatenate([spoken("yes no day"), silence(1.5)] * 12)
recognizer = Recognizer(sys.argv[1])
def heard(minutes):
    blocks = (part for _ in range(minutes) for part in np.array_split(minute, 12))
    count = sum(len(update.final) for update in recognizer.transcribe(blocks))
    return count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(*heard(1), *heard(9))
"""


def test_long_audio_takes_no_more_memory_than_a_minute(folder: Path) -> None:
    # a process of its own, whose peak nothing has raised before; kept features would be 17 MB, kept samples 34 MB
    command = [sys.executable, "-c", _LONG, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, before, many, after = map(int, done.stdout.split())
    assert (few, many) == (12, 108)
    assert after - before < 4000  # KiB


def test_a_folder_that_does_not_fit_its_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="threads"):
        Recognizer(folder, threads=0)
    with pytest.raises(UserError, match="threads: got 100000, wanted 1 to 64"):
        Recognizer(folder, threads=100_000)
    other = export_tones(tmp_path / "other")
    about = json.loads((other / "kdsuite.json").read_text(encoding="utf-8"))
    (other / "model.int8.onnx").write_bytes(b"no model")
    tokens = (other / "tokens.txt").read_text(encoding="utf-8").replace("<blk> 8", "z 8\n<blk> 9")
    (other / "tokens.txt").write_text(tokens, encoding="utf-8")
    # a folder that was made so, not one that was changed
    for name in ("model.int8.onnx", "tokens.txt"):
        data = (other / name).read_bytes()
        about["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (other / "kdsuite.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.int8\.onnx: cannot be run"):
        Recognizer(other)
    with pytest.raises(UserError, match=r"model\.onnx: gives 9 classes; tokens\.txt has 10"):
        segments(Recognizer(other, int8=False), spoken("yes"))


def test_a_stream_is_made_by_its_recogniser(recognizer: Recognizer) -> None:
    assert isinstance(recognizer.stream(), Stream)


def test_three_packages_are_all_that_it_needs(folder: Path) -> None:
    # sys.modules has None for what is not installed
    absent = ("yaml", "soundfile", "soxr", "torch", "flashlight", "scipy", "rich", "jsonargparse", "sounddevice")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        "import numpy as np; from apps.speech.runtime import Recognizer; "
        f"samples = np.frombuffer(open({str(folder / 'self_test.wav')!r}, 'rb').read()[44:], '<i2'); "
        f"updates = Recognizer({str(folder)!r}).transcribe([(samples / 32768).astype(np.float32)]); "
        "print(*(segment.text for update in updates for segment in update.final))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "yes no\n"


def test_no_torch(folder: Path) -> None:
    code = (
        "import sys, numpy as np; from apps.speech.runtime import Recognizer, Decoding; "
        "from apps.speech.device import live, microphone, transcribe, transcribe_cli; "
        f"r = Recognizer({str(folder)!r}, decoding=Decoding(hot_words={{'yes': 2.0}})); "
        "list(r.transcribe([np.zeros(16000, np.float32)])); "
        "print([m for m in ('torch', 'torchaudio', 'transformers', 'sentencepiece', 'scipy', 'flashlight', 'rich') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["tokens.txt", "model.int8.onnx"])
def test_a_file_of_another_export_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    # of the same size: two symbols change places, some weights
    before = (other / name).read_bytes()
    swapped = before.translate(bytes.maketrans(b"ad", b"da"))
    (other / name).write_bytes(swapped)
    assert swapped != before
    with pytest.raises(UserError, match=f"{name}: was changed since the export"):
        Recognizer(other)
