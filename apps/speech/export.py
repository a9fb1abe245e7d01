"""The streaming student as others can run it: a folder for sherpa-onnx and our own runtime, proved and described.

``apps.speech.device.folder`` reads what is written here; neither needs the other's machine, nor torch to read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.speech.alignment import align
from apps.speech.calibration import CALIBRATIONS
from apps.speech.card import Card, ModelFile, RunFacts, render, run_facts
from apps.speech.decode.confidence import Calibration
from apps.speech.decode.greedy import greedy
from apps.speech.device.folder import (
    ABOUT,
    BLANK,
    CARD,
    CLIP,
    FORMAT,
    INPUTS,
    INT8_MODEL,
    MODEL,
    MODELS,
    OUTPUTS,
    TOKENS,
    is_export,
    sha256,
)
from apps.speech.device.folder_check import Listener
from apps.speech.device.spelling import Symbols
from apps.speech.features import FEATURES, SAMPLE_RATE, SILENCE, fbank, with_tail
from apps.speech.models import StreamingModel
from apps.speech.models.base import FRAME_MS, SUBSAMPLING
from apps.speech.models.store import load_model
from apps.speech.onnx_step import OnnxStep, inputs_of, windows
from apps.speech.pipeline import Pipeline
from apps.speech.text import TextRules
from apps.speech.units import Units
from apps.speech.views import parse_view
from kdcore.config import UserError, build
from kdcore.folders import check_target, replacing
from kdcore.onnx_export import ParityError, check_parity, quantise_onnx, trace_onnx
from kdcore.run import read_json, write_json, write_text

# of log-probabilities, between onnxruntime and PyTorch and between a stream and the whole
_TOLERANCE = 1e-4
# what --only names
_ONLY = {"int8": INT8_MODEL, "fp32": MODEL}
# utterances on which that is proved, and their feature frames at most
_PROVED, _LONGEST = 3, 1000
# utterances that both models transcribe
_MOST_CLIPS = 1000
_LONGEST_CHUNK_MS = 2000
# seconds of a clip that is not too short to say something nor too long to ship
_CLIP_SECONDS = (1.0, 4.0)


@dataclass(frozen=True)
class Clip:
    """A recording for the proof: samples float32 [n] at 16 kHz, and its normalised text where there is one."""

    name: str
    samples: np.ndarray
    text: str | None = None


def export(
    run: Path,
    role: str,
    out: Path,
    *,
    name: str | None = None,
    licence: str | None = None,
    only: str | None = None,
    chunk_ms: int | None = None,
) -> Path:
    """Write the deployed student of a finished run to ``out`` and return it; the folder appears whole or not at all.

    Files: ``model.onnx`` and ``model.int8.onnx``, ``tokens.txt``, ``self_test.wav`` (a recording of the test part),
    ``README.md`` (the model card), ``kdsuite.json``. The same run gives the same bytes. An earlier export in ``out`` is
    replaced, anything else there is refused.

    Options:
        role: ``student`` or ``student_alone``.
        name: of the model; that of the run's folder otherwise.
        licence: of the data, for the card; what is stated beside the recordings otherwise.
        only: ``int8`` or ``fp32`` keeps that model file alone, for a small download.
        chunk_ms: what one step hears, a multiple of 40 ms, instead of the chunk of training: short ones answer sooner,
            long ones cost less. For a model that says the same in any chunk, or that was trained with this one among
            its ``chunks``; its error rates in them are then those of the clips alone.

    Raises:
        UserError: an unfinished run, a model that does not stream, a chunk that it was not trained for, or ``out``
            holds something else.
        ParityError: onnxruntime does not answer as PyTorch does.
    """
    check_target(out, is_export)
    pipeline = Pipeline.reopen(run)
    model, units = load_model(run / role)
    if not isinstance(model, StreamingModel):
        raise UserError(
            f"{run / role}: {model.label()} hears whole utterances; wanted --model student or student_alone"
        )
    facts = run_facts(pipeline, role, licence)
    if chunk_ms is not None:
        # what was measured in other chunks is not said of these
        facts = replace(facts, delays={}) if _set_chunk(model, chunk_ms) else _unmeasured(facts)
    # of the seed's own model: what a later evaluation wrote is not beside its copy at the top of the run
    beside = run / "seeds" / str(facts.seed) / role
    calibration, calibration_lm = (_calibration(beside / name) for name in CALIBRATIONS.values())
    file = beside / "delay.json"
    delay_ms = int(read_json(file, dict)["delay_ms"]) if file.exists() else 0
    decode = _decoding(pipeline, role, facts.seed)
    clips, name = _clips(pipeline), name or run.name
    given: dict[str, Any] = {"calibration": calibration, "calibration_lm": calibration_lm}
    given |= {"delay_ms": delay_ms, "decode": decode, "text": pipeline.config.data.text}
    export_model(model, units, out, clips, name, **given, run=facts, only=only)
    return out


def _calibration(file: Path) -> Calibration | None:
    return build(Calibration, read_json(file, dict), str(file)) if file.exists() else None


def _unmeasured(facts: RunFacts) -> RunFacts:
    """Return what is known of a model whose answers are others than those that were measured."""
    return replace(facts, delays={}, rates=(), differences=())


def _set_chunk(model: StreamingModel, chunk_ms: int) -> bool:
    """Make a model work in other chunks; return whether its answers stay the same.

    UserError where they do not, and it was not trained with such chunks.
    """
    if chunk_ms % FRAME_MS or not FRAME_MS <= chunk_ms <= _LONGEST_CHUNK_MS:
        raise UserError(f"--chunk-ms: got {chunk_ms}, wanted a multiple of {FRAME_MS} up to {_LONGEST_CHUNK_MS}")
    before, chunk = model.look_ahead_ms, model.chunk_frames
    trained = sorted({chunk, *getattr(model.options, "chunks", ())})
    model.options = replace(model.options, chunk=chunk_ms // FRAME_MS)
    same = model.look_ahead_ms == before
    if not same and model.chunk_frames not in trained:
        known = ", ".join(str(each * FRAME_MS) for each in trained)
        raise UserError(
            f"--chunk-ms: got {chunk_ms}, but {model.kind} looks ahead in its chunks and was trained in those of "
            f"{known} ms; train one with another student.options.chunk, or with several student.options.chunks"
        )
    return same


def export_model(
    model: StreamingModel,
    units: Units,
    out: Path,
    clips: Iterable[Clip],
    name: str,
    *,
    calibration: Calibration | None = None,
    calibration_lm: Calibration | None = None,
    delay_ms: int = 0,
    decode: Mapping[str, Any] | None = None,
    text: TextRules | None = None,
    run: RunFacts | None = None,
    only: str | None = None,
) -> None:
    """Write any streaming model as ``export`` does.

    Options:
        clips: recordings on which parity is proved and both models are compared, the first thousand; one of them
            becomes the self-test.
        calibration, calibration_lm: what makes confidences probabilities, of best paths and of words of a lexicon.
        delay_ms: how long after a word the model emits it.
        decode: settings of use in decoding, as they are stored.
        text: how the transcripts of training were normalised; the default rules otherwise.
        run: what the card says of data, training and accuracy.
        only: as ``export``; the other model is compared with all the same.

    Raises:
        UserError, ParityError: as ``export``.
        ValueError: no clip.
    """
    check_target(out, is_export)
    model.eval()
    with replacing(out, is_export) as folder:
        step = OnnxStep(model)
        _write_models(step, len(units.symbols), folder)
        write_text(folder / TOKENS, "".join(f"{each} {at}\n" for at, each in enumerate((*units.symbols, BLANK))))
        first, given = _begun(clips)
        parity = prove(model, step, folder / MODEL, [_features(clip)[:_LONGEST] for clip in first])
        compared = _compare(folder, step.window, units, _chain(first, given))
        _write_clip(folder / CLIP, compared.samples)
        kept = _keep(folder, only)
        card = Card(
            name=name,
            kind=model.kind,
            parameters=model.parameter_count(),
            units=_units(units),
            symbols=len(units.symbols),
            chunk_ms=model.chunk_frames * FRAME_MS,
            look_ahead_ms=model.look_ahead_ms,
            parity=parity,
            models=tuple(each for each in compared.files if each.name in kept),
            clip=f"recording {compared.name}",
            clip_texts={file: compared.texts[file] for file in kept},
            run=run,
        )
        write_text(folder / CARD, render(card))
        about = {**_about(card, calibration, calibration_lm), "delay_ms": delay_ms, "decode": dict(decode or {})}
        about |= {"text": asdict(text or TextRules()), "self_test": {"audio": CLIP, "text": card.clip_texts}}
        write_json(folder / ABOUT, {**about, "files": _checksums(folder)})


def _begun(clips: Iterable[Clip]) -> tuple[list[Clip], Iterator[Clip]]:
    """Return the clips on which parity is proved, and what follows them."""
    given = iter(clips)
    first = list(islice(given, _PROVED))
    if not first:
        raise ValueError("clips: got none, wanted at least one")
    return first, given


def _keep(folder: Path, only: str | None) -> tuple[str, ...]:
    """Remove the model that is not wanted and return the names of those that are."""
    kept = MODELS if only is None else (_ONLY[only],)
    for left_out in set(MODELS) - set(kept):
        (folder / left_out).unlink()
    return kept


def _about(card: Card, calibration: Calibration | None, calibration_lm: Calibration | None) -> dict[str, Any]:
    """Return what ``kdsuite.json`` says of the model."""
    frames = card.chunk_ms // FRAME_MS * SUBSAMPLING
    return {
        "format": FORMAT,
        **{name: getattr(card, name) for name in ("name", "kind", "parameters", "units")},
        "sample_rate": SAMPLE_RATE,
        "window_size": frames,
        "chunk_shift": frames,
        "subsampling_factor": SUBSAMPLING,
        "chunk_ms": card.chunk_ms,
        "look_ahead_ms": card.look_ahead_ms,
        "confidence": _slope(calibration),
        "confidence_lm": _slope(calibration_lm),
    }


def _slope(calibration: Calibration | None) -> dict[str, float] | None:
    return {"slope": calibration.scale, "offset": calibration.offset} if calibration else None


@torch.no_grad()
def prove(model: StreamingModel, step: OnnxStep, path: Path, features: Sequence[np.ndarray]) -> float:
    """Return the largest difference of log-probabilities between onnxruntime, streaming, and PyTorch hearing the whole.

    Each step is compared as well, states included, for one stream and for all [T, 80] of them at once.

    Raises:
        ParityError: a difference above 1e-4, or a value that is not finite.
    """
    worst = 0.0
    listener = Listener(path, step.window)
    for given in ([features[0]], [features[place % len(features)] for place in range(3)]):
        utterances = [torch.from_numpy(each) for each in given]
        batches = list(_steps(step, utterances))
        worst = max(worst, check_parity(step, path, batches, outputs=list(OUTPUTS), tolerance=_TOLERANCE))
        caches: list[np.ndarray] = listener.start(len(given))
        parts = []
        for batch in batches:
            log_probs, _, *caches = listener.step(batch[INPUTS[0]].numpy().transpose(0, 2, 1), caches)
            parts.append(log_probs)
        heard = torch.from_numpy(np.concatenate(parts, axis=1))
        for row, each in zip(heard, utterances, strict=True):
            whole = torch.log_softmax(model(each[None], torch.tensor([len(each)])), 2)[0]
            difference = float((row[: len(whole)] - whole).abs().max())
            if not difference <= _TOLERANCE:
                raise ParityError(
                    f"{path}: a stream differs from PyTorch on the whole utterance by {difference:.3g}, "
                    f"wanted at most {_TOLERANCE}"
                )
            worst = max(worst, difference)
    return worst


def _steps(step: OnnxStep, features: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs of each step of some utterances, the caches those that PyTorch gives."""
    caches: Sequence[Tensor] = step.start(len(features))
    for window in windows(step, features):
        batch = inputs_of(window, caches)
        yield batch
        caches = step(*batch.values())[2:]


def _write_models(step: OnnxStep, vocabulary: int, folder: Path) -> None:
    window = torch.full((2, FEATURES, step.window), SILENCE)
    varies = {0: "N"}
    trace_onnx(
        step,
        list(inputs_of(window, step.start(2)).values()),
        folder / MODEL,
        inputs=dict.fromkeys(INPUTS, varies),
        outputs=dict.fromkeys(OUTPUTS, varies),
        metadata=step.metadata(vocabulary),
    )
    quantise_onnx(folder / MODEL, folder / INT8_MODEL)


@dataclass
class _Compared:
    """What both models hear in the clips, and the clip that becomes the self-test."""

    files: tuple[ModelFile, ...] = ()
    name: str = ""
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    texts: dict[str, str] = field(default_factory=dict)


def _compare(folder: Path, window: int, units: Units, clips: Iterable[Clip]) -> _Compared:
    """Return the texts' agreement and error rates, and the clip on whose text both models agree most surely."""
    listeners = {name: Listener(folder / name, window) for name in MODELS}
    symbols, found = Symbols(units.symbols), _Compared()
    heard: dict[str, list[str]] = {name: [] for name in MODELS}
    references: list[str | None] = []
    best = (-1, -1.0)
    for clip in clips:
        # as the file will have it
        clip = replace(clip, samples=_as_stored(clip.samples))
        features, least = _features(clip), 1.0
        for name, listener in listeners.items():
            said = greedy(listener.hear(features))
            heard[name].append(symbols.decode(said.ids))
            least = min([least, *said.probabilities])
        references.append(clip.text)
        texts = {name: heard[name][-1] for name in MODELS}
        seconds = len(clip.samples) / SAMPLE_RATE
        fits = _CLIP_SECONDS[0] <= seconds <= _CLIP_SECONDS[1]
        agreed = bool(texts[MODEL]) and len(set(texts.values())) == 1
        if (rank := (2 * agreed + fits, least)) > best:
            best, found.name, found.samples, found.texts = rank, clip.name, clip.samples, texts
    found.files = tuple(
        ModelFile(
            name=name,
            bytes=(folder / name).stat().st_size,
            clips=len(references),
            same=sum(a == b for a, b in zip(heard[name], heard[MODEL], strict=True)),
            wer=_word_error_rate(references, heard[name]),
        )
        for name in MODELS
    )
    return found


def _word_error_rate(references: Sequence[str | None], heard: Sequence[str]) -> float | None:
    """Return errors over words of the clips that have a text; None where none has a word."""
    pairs = [(reference, text) for reference, text in zip(references, heard, strict=True) if reference is not None]
    words = sum(len(reference.split()) for reference, _ in pairs)
    if not words:
        return None
    alignments = align([reference for reference, _ in pairs], [text for _, text in pairs])
    return sum(sum(each.counts) for each in alignments) / words


def _features(clip: Clip) -> np.ndarray:
    return fbank(with_tail(clip.samples))


def _as_stored(samples: np.ndarray) -> np.ndarray:
    """Return samples as 16 bits hold them."""
    return (_sixteen_bits(samples) / np.float32(1 << 15)).astype(np.float32)


def _sixteen_bits(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(samples * (1 << 15)), -(1 << 15), (1 << 15) - 1).astype("<i2")


def _write_clip(path: Path, samples: np.ndarray) -> None:
    import soundfile

    soundfile.write(os.fspath(path), _sixteen_bits(samples), SAMPLE_RATE, format="WAV", subtype="PCM_16")


def _chain(first: Sequence[Clip], rest: Iterator[Clip]) -> Iterator[Clip]:
    yield from first
    yield from islice(rest, _MOST_CLIPS - len(first))


def _clips(pipeline: Pipeline) -> Iterator[Clip]:
    """Yield the recordings of a run's test part, as its models were tested on them."""
    corpus, rules = pipeline.prepared.corpora["test"], pipeline.config.data.text
    heard = parse_view(pipeline.config.test_view)
    for each in corpus.utterances:
        text = None if each.text is None else rules.normalise(each.text)
        yield Clip(each.id, heard.hear(corpus, each, 0), text)


def _decoding(pipeline: Pipeline, role: str, seed: int | None) -> dict[str, Any]:
    """Return how the run decoded, and the weights it chose for this model on validation."""
    decode = pipeline.config.decode
    found: dict[str, Any] = {"beam": decode.beam, "order": decode.order}
    rows = [row for row in pipeline.run.read_metrics() if row["role"] == role and row["seed"] == seed]
    weights = next((row["lm_weights"] for row in rows if row.get("lm_weights")), None)
    return found | (dict(zip(("lm_weight", "word_score"), weights, strict=True)) if weights else {})


def _units(units: Units) -> str:
    return "characters" if units.model is None else "pieces"


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        file.name: {"sha256": sha256(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
        if file.name != ABOUT
    }
