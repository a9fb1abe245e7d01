"""The exported student on the device: bytes, speed, memory, what it hears beside others, and live streams."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.speech.bench_commands import installed, starts, transcribed
from apps.speech.bench_results import complete
from apps.speech.bench_server import streamed
from apps.speech.config import load_config
from apps.speech.data.corpora import find_data
from apps.speech.decode.greedy import greedy
from apps.speech.decode.words import timed_words
from apps.speech.device.folder import INT8_MODEL, MODEL, TOKENS, ExportedFolder
from apps.speech.export import Clip, export, export_model
from apps.speech.features import SAMPLE_RATE, TAIL_MS
from apps.speech.latency import summarise
from apps.speech.measurement import Measurement
from apps.speech.models import StreamingModel, new_model
from apps.speech.pipeline import Pipeline
from apps.speech.runtime import Recognizer
from kdcore.progress import Announcer

RECIPE = "ctc_sequence_level"
# how the device decodes where it is given a language model
LM = "beam 16, language model"
# samples of a packet of a live stream: 40 ms
_PACKET = 640
# of exports in other chunks than that of training
CHUNKS_MS = (80, 640)
TARGETS = {
    "small_int8_bytes": 1_100_000,
    "tiny_int8_bytes": 450_000,
    "real_time_factor": 0.008,
    "real_time_factor_beam_lm": 0.01,
    "peak_megabytes": 120,
    "first_word_seconds": 0.6,
    "ready_seconds": 0.4,
    "ondevice_megabytes": 120,
    "final_ms_p95": 500,
    "int8_costs": 0.003,
    "sherpa_same_text": 0.99,
    "flicker": 0.15,
    "first_partial_ms_p95": "look-ahead + 200",
}


def run(
    work: Path,
    *,
    data: str = "an4",
    streams: int = 40,
    stream_seconds: float = 15.0,
    hour: float = 3600.0,
    repeats: int = 5,
    overrides: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Measure the student that ``bench quality`` has, or one of a single seed that is trained now, on the test part.

    Options:
        streams, stream_seconds: live streams at once, and what each says.
        hour: seconds of the long file.
        repeats: of what is measured from the start of a process.

    Raises:
        UserError: no such data.
    """
    name = find_data(data).name
    trained, own = work / f"speech-{name}-{RECIPE}", work / f"speech-{name}-runtime"
    if (trained / "report.html").exists():  # the last that a finished run has
        pipeline = Pipeline.reopen(trained, Announcer())
    else:
        given = [("data.path", json.dumps(data)), ("seeds", "[0]"), *overrides]
        pipeline, _ = complete(load_config(recipe=RECIPE, overrides=given), own / "run")
    bench = Bench(pipeline, own)
    commands, texts = bench.commands(hour)
    return {
        "data": f"{name}, its {len(bench.texts)} test utterances",
        "size": bench.sizes(),
        "installed": installed("ondevice"),
        "commands": commands,
        "starts": starts(bench.folder, bench.shortest, repeats),
        "word_error_rate": bench.error_rates(texts),
        "sherpa_onnx": bench.beside_sherpa(texts),
        "streaming": bench.streaming(bench.folder, texts["int8"]),
        "chunks": bench.chunks(texts["fp32"]),
        "server": streamed(
            bench.folder, bench.clips, streams=streams, seconds=stream_seconds, work=bench.work / "server"
        ),
        "targets": TARGETS,
    }


@dataclass
class Bench:
    """The deployed student of a run, exported to ``work``, and what it is measured on."""

    pipeline: Pipeline
    work: Path

    @cached_property
    def folder(self) -> Path:
        """The export."""
        return export(self.pipeline.run.path, "student", self.work / "exported", name="student")

    @cached_property
    def clips(self) -> list[np.ndarray]:
        """The recordings of the test part, float32 [n] at 16 kHz."""
        corpus = self.pipeline.prepared.corpora["test"]
        return [corpus.load(each) for each in corpus.utterances]

    @cached_property
    def texts(self) -> list[str]:
        """What is said in them."""
        return self.pipeline.prepared.texts("test")

    @cached_property
    def files(self) -> list[Path]:
        """They as wav files."""
        import soundfile

        folder = self.work / "audio"
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{place:04}.wav" for place in range(len(self.clips))]
        for path, clip in zip(paths, self.clips, strict=True):
            soundfile.write(os.fspath(path), clip, SAMPLE_RATE, subtype="PCM_16")
        return paths

    @property
    def shortest(self) -> Path:
        """The shortest of them."""
        return self.files[min(range(len(self.clips)), key=lambda row: len(self.clips[row]))]

    def sizes(self) -> dict[str, Any]:
        """Return the bytes of exports with the int8 model alone, all files; the tiny student is one nobody trained."""
        pipeline, tiny = self.pipeline, self.work / "tiny"
        torch.manual_seed(0)
        units = self.pipeline.prepared.units
        model = new_model("conv_rnn", units.blank + 1, {"size": "tiny"})
        if not isinstance(model, StreamingModel):
            raise TypeError(f"model: got {model.label()}, wanted a streaming one")
        model.set_statistics(
            *(torch.from_numpy(each) for each in pipeline.prepared.store("train", "clean").statistics())
        )
        export_model(model, units, tiny, [Clip("clip", self.clips[0])], "tiny", only="int8")
        small = export(self.pipeline.run.path, "student", self.work / "int8", name="student", only="int8")
        found = {}
        for name, folder in (("student", small), ("tiny, untrained", tiny)):
            about = ExportedFolder.open(folder)
            sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
            found[name] = {
                "parameters": about.parameters,
                "int8_bytes": sum(sizes.values()),
                "model_bytes": sizes[INT8_MODEL],
            }
        return found

    def commands(self, hour: float) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Return what ``kd speech transcribe`` costs on one core in some ways of use, and what each hears."""
        lm = ["--lm", str(Measurement(self.pipeline).language_model), "--beam", "16"]
        found, texts = {}, {}
        ways = {"int8": [], "fp32": ["--fp32"], f"int8, {LM}": lm, f"fp32, {LM}": ["--fp32", *lm]}
        for name, options in ways.items():
            self.pipeline.announce(f"transcribing the test part: {name}")
            texts[name], found[name] = transcribed(self.folder, self.files, options)
        self.pipeline.announce(f"transcribing {hour:g} s in one file")
        _, found[f"int8, one file of {hour:g} s"] = transcribed(self.folder, [self._long(hour)])
        return found, texts

    def _long(self, seconds: float) -> Path:
        import soundfile

        path, count, row = self.work / "long.wav", 0, 0
        with soundfile.SoundFile(os.fspath(path), "w", SAMPLE_RATE, 1, "PCM_16") as handle:
            while count < seconds * SAMPLE_RATE:
                clip = self.clips[row % len(self.clips)]
                handle.write(clip)
                count, row = count + len(clip), row + 1
        return path

    def error_rates(self, texts: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """Return word error rates by what was heard, and what int8 adds."""
        measurement = Measurement(self.pipeline)
        rates = {
            name: measurement.scored("test", heard, self.pipeline.config.test_view).wer for name, heard in texts.items()
        }
        costs = {"int8 costs": ("int8", "fp32"), f"int8 costs, {LM}": (f"int8, {LM}", f"fp32, {LM}")}
        return {**rates, **{name: rates[one] - rates[other] for name, (one, other) in costs.items()}}

    def beside_sherpa(self, texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Return the share of utterances in which sherpa-onnx writes what ``kd speech transcribe`` does."""
        try:
            import sherpa_onnx
        except ImportError:
            return {"left_out": "sherpa-onnx is not installed"}
        about, found = ExportedFolder.open(self.folder), {}
        # as the card says: behind the end, silence for the tail and for a last whole window
        tail = np.zeros((TAIL_MS + 2 * about.chunk_ms) * SAMPLE_RATE // 1000, np.float32)
        for name, model in (("int8", INT8_MODEL), ("fp32", MODEL)):
            recognizer = sherpa_onnx.OnlineRecognizer.from_nemo_ctc(
                tokens=str(self.folder / TOKENS), model=str(self.folder / model), num_threads=1
            )
            same = 0
            for clip, text in zip(self.clips, texts[name], strict=True):
                stream = recognizer.create_stream()
                stream.accept_waveform(SAMPLE_RATE, np.concatenate([clip, tail]))
                stream.input_finished()
                while recognizer.is_ready(stream):
                    recognizer.decode_stream(stream)
                same += " ".join(recognizer.get_result(stream).split()) == text
            found[name] = {"utterances": len(self.clips), "same_text": same / len(self.clips)}
        return found

    def chunks(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return by the milliseconds of a chunk what it costs in files and when the first partial result comes.

        All in float32, whose ``texts`` they are compared with.
        """
        found = {}
        for chunk_ms in CHUNKS_MS:
            folder = self.work / f"chunks-{chunk_ms}"
            export(self.pipeline.run.path, "student", folder, name="student", chunk_ms=chunk_ms)
            heard, cost = transcribed(folder, self.files, ["--fp32"])
            live = self.streaming(folder, texts, int8=False)
            found[str(chunk_ms)] = {
                "real_time_factor": cost["real_time_factor"],
                "same_text": float(np.mean([one == other for one, other in zip(heard, texts, strict=True)])),
                "first_partial_ms": live["first_partial_ms"],
            }
        return found

    def streaming(self, folder: Path, texts: Sequence[str], *, int8: bool = True) -> dict[str, Any]:
        """Return how partial results change and when the first comes, in packets of 40 ms, by the teacher's times.

        What is final is never taken back: it is compared with ``texts``, what the whole files said.
        """
        recognizer = Recognizer(folder, int8=int8)
        teacher = Measurement(self.pipeline).hear(self.pipeline.cells(self.pipeline.config.seeds[0])[0], "test")
        symbols = self.pipeline.prepared.units.symbols
        changed = updates = same = 0
        waits: list[float | None] = []
        for clip, theirs, text in zip(self.clips, teacher.log_probs, texts, strict=True):
            said = timed_words(greedy(theirs), symbols)
            before, first, final = "", None, ""
            for heard, partial, finals in _updates(recognizer, clip):
                if partial and first is None:
                    first = heard
                final = " ".join([final, *finals]).strip()
                now = " ".join([final, partial]).strip()
                if now != before:
                    updates, changed = updates + 1, changed + (not now.startswith(before))
                    before = now
            same += final == text
            waits.append(1e3 * (first - said[0]["end"]) if said and first is not None else None)
        about = ExportedFolder.open(folder)
        return {
            "updates": updates,
            "flicker": changed / max(updates, 1),
            "same_text_as_whole_files": same / len(self.clips),
            "first_partial_ms": summarise(waits),
            "look_ahead_ms": about.look_ahead_ms,
            "chunk_ms": about.chunk_ms,
        }


def _updates(recognizer: Recognizer, clip: np.ndarray) -> Iterator[tuple[float, str, list[str]]]:
    """Yield seconds heard, the partial result and the texts of new final ones."""
    stream = recognizer.stream()
    for start in range(0, len(clip), _PACKET):
        update = stream.accept(clip[start : start + _PACKET])
        yield stream.seconds, update.partial, [segment.text for segment in update.final]
    update = stream.finish()
    yield stream.seconds, update.partial, [segment.text for segment in update.final]
