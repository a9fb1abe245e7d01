"""Checks of an exported folder before it ships: whether it is whole, and its models hear what they should. No torch.

Nothing of a folder is trusted: a model whose file was changed is not run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.speech.decode.greedy import greedy
from apps.speech.device.folder import ABOUT, INPUTS, OUTPUTS, ExportedFolder, sha256
from apps.speech.device.spelling import Symbols
from apps.speech.features import FEATURES, SAMPLE_RATE, SILENCE, fbank, with_tail
from kdcore.config import UserError

if TYPE_CHECKING:
    import onnxruntime

# a second copy of a stream in a batch may differ from one by itself by rounding
_TOLERANCE = 1e-4
# seconds of a self-test clip at most
_LONGEST_CLIP = 600.0
# what an export holds beside the weights: statistics of features, tables of positions, scales of int8
_SHARE_BESIDE, _MOST_BESIDE = 0.05, 1 << 16
# fields of ModelProto, GraphProto and TensorProto (onnx.proto)
_GRAPH, _INITIALISER, _DIMS = 7, 5, 1


@dataclass(frozen=True)
class Finding:
    """One check: of which file, what was looked at, whether it holds, and the reason or the figure."""

    file: str
    check: str
    ok: bool
    detail: str = ""


class Listener:
    """A model file with onnxruntime: whole utterances, window by window, as a device hears them.

    Raises:
        UserError: onnxruntime cannot run the file.
    """

    def __init__(self, path: str | os.PathLike[str], window: int, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors only
        self.path, self.window = Path(path), window
        try:
            self.session: onnxruntime.InferenceSession = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own exceptions have no base of their own
            raise UserError(f"{path}: cannot be run: {_line(error)}") from None

    def start(self, batch: int = 1) -> list[np.ndarray]:
        """Return the caches before the first step."""
        shapes = [each.shape[1:] for each in self.session.get_inputs()[2:4]]
        return [*(np.zeros((batch, *shape), np.float32) for shape in shapes), np.zeros(batch, np.int64)]

    def step(self, windows: np.ndarray, caches: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs of one step on windows float32 [N, window, 80]."""
        signal = np.ascontiguousarray(windows.transpose(0, 2, 1))
        given = (signal, np.full(len(windows), windows.shape[1], np.int64), *caches)
        outputs: list[np.ndarray] = self.session.run(list(OUTPUTS), dict(zip(INPUTS, given, strict=True)))
        return outputs

    def hear(self, features: np.ndarray) -> np.ndarray:
        """Return log-probabilities float32 [ceil(T / 4), C] of features [T, 80]; silence completes the last window."""
        missing = -len(features) % self.window
        whole = np.concatenate([features, np.full((missing, FEATURES), SILENCE, np.float32)])
        caches, parts = self.start(), []
        for place in range(0, len(whole), self.window):
            log_probs, _, *caches = self.step(whole[None, place : place + self.window], caches)
            parts.append(log_probs[0])
        return np.concatenate(parts)[: -(-len(features) // 4)]


def heard_text(listener: Listener, samples: np.ndarray, symbols: Sequence[str]) -> str:
    """Return the best path's text of samples float32 [n] at 16 kHz and the silence that is put behind them."""
    log_probs = listener.hear(fbank(with_tail(samples)))
    return Symbols(tuple(symbols)).decode(greedy(log_probs).ids)


def check_folder(path: str | os.PathLike[str]) -> list[Finding]:
    """Return what was checked of an exported folder, in order; what could not be looked at has no finding.

    Files and their hashes; each model's inputs, outputs and metadata, its answers to silence, noise and the loudest
    samples (finite, probabilities, the same alone and in a batch), and the text of the self-test clip.
    """
    try:
        folder = ExportedFolder.open(path)
    except UserError as error:
        return [Finding(ABOUT, "files", False, str(error))]
    sizes = f"{len(folder.files)} files, {sum(each.bytes for each in folder.files.values()):,} bytes"
    found = [Finding(ABOUT, "files", True, sizes)]
    changed = [name for name, listed in folder.files.items() if sha256(folder.path / name) != listed.sha256]
    for name in folder.files:
        reason = f"{folder.path / name}: was changed since the export" if name in changed else ""
        found.append(Finding(name, "hash", name not in changed, reason))
    found += [
        Finding(name, "listed", False, f"{folder.path / name}: no export wrote this file")
        for name in folder.extra_files()
    ]
    clip = str(folder.self_test["audio"])
    for name in folder.models:
        if name not in changed:
            found += _check_model(folder, name, None if clip in changed else folder.path / clip)
    return found


def _check_model(folder: ExportedFolder, name: str, clip: Path | None) -> Iterator[Finding]:
    """Yield the findings on a model; the first bad one is the last, since the others build on it."""
    steps: list[tuple[str, Callable[[ExportedFolder, Listener], str]]] = [
        ("interface", _interface),
        ("answers", _answers),
    ]
    if clip is not None:
        steps.append(("self test", lambda folder, listener: _self_test(folder, listener, clip, name)))
    try:
        listener = Listener(folder.path / name, folder.window_size)
    except UserError as error:
        yield Finding(name, "runs", False, str(error))
        return
    for check, look in steps:
        try:
            detail = look(folder, listener)
        except UserError as error:
            yield Finding(name, check, False, str(error))
            return
        except Exception as error:  # a foreign model can fail in onnxruntime in any way
            yield Finding(name, check, False, f"{listener.path}: fails: {_line(error)}")
            return
        yield Finding(name, check, True, detail)


def _interface(folder: ExportedFolder, listener: Listener) -> str:
    """Refuse a model with other inputs, outputs, metadata or size than the folder's; return its cache sizes."""
    session, path = listener.session, listener.path
    for what, got, wanted in (
        ("inputs", [each.name for each in session.get_inputs()], INPUTS),
        ("outputs", [each.name for each in session.get_outputs()], OUTPUTS),
    ):
        if got != list(wanted):
            raise UserError(f"{path}: has the {what} {', '.join(got)}; wanted {', '.join(wanted)}")
    about = dict(session.get_modelmeta().custom_metadata_map)
    wanted_values = {
        "window_size": folder.window_size,
        "chunk_shift": folder.chunk_shift,
        "subsampling_factor": folder.subsampling_factor,
        "vocab_size": len(folder.symbols),
        "model_type": "EncDecCTCModelBPE",
        "normalize_type": "",
    }
    for name, value in wanted_values.items():
        if about.get(name) != str(value):
            raise UserError(f"{path}: metadata {name}: got {about.get(name)!r}, wanted {str(value)!r}")
    shapes = {each.name: list(each.shape) for each in session.get_inputs()}
    if shapes["audio_signal"][1:] != [FEATURES, folder.window_size]:
        raise UserError(
            f"{path}: audio_signal: got {shapes['audio_signal']}, wanted [N, {FEATURES}, {folder.window_size}]"
        )
    for cache in INPUTS[2:4]:
        sizes = [about.get(f"{cache}_dim{axis}") for axis in (1, 2, 3)]
        if [str(size) for size in shapes[cache][1:]] != sizes:
            raise UserError(f"{path}: metadata of {cache}: got {sizes}, wanted {shapes[cache][1:]}")
    beside = _numbers_held(path) - folder.parameters
    if abs(beside) > _MOST_BESIDE + _SHARE_BESIDE * folder.parameters:
        held = beside + folder.parameters
        raise UserError(f"{path}: holds {held:,} numbers; {ABOUT} says parameters: {folder.parameters:,}")
    return ", ".join(f"{cache} {shapes[cache][1:]}" for cache in INPUTS[2:4])


def _numbers_held(path: Path) -> int:
    """Return how many numbers the initialisers of an ONNX file hold; read from its bytes, as devices lack ``onnx``."""
    count = 0
    for graph in _fields(memoryview(path.read_bytes()), _GRAPH):
        for tensor in _fields(graph, _INITIALISER):
            # several numbers of a field may stand in one
            count += math.prod(size for each in _fields(tensor, _DIMS) for size in _varints(each))
    return count


def _fields(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """Yield the bytes of each field of that number in a protobuf message."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        start, kind = place, tag & 7
        if kind == 0:
            _, place = _varint(message, place)
        elif kind == 2:
            size, start = _varint(message, place)
            place = start + size
        else:
            place += {1: 8, 5: 4}[kind]
        if tag >> 3 == wanted:
            yield message[start:place]


def _varints(data: memoryview) -> Iterator[int]:
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        yield value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, the lowest first, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _answers(folder: ExportedFolder, listener: Listener) -> str:
    """Refuse a model whose answers are no probabilities, or depend on the batch; return the largest difference."""
    path, window, classes = listener.path, folder.window_size, len(folder.symbols) + 1
    random = np.random.default_rng(0)
    loudest = np.where(random.random(window * 160 * 3) < 0.5, -1, 1).astype(np.float32)
    noise = random.normal(0, 0.1, len(loudest)).astype(np.float32)
    streams = [np.full((3 * window, FEATURES), SILENCE, np.float32)]
    streams += [fbank(each)[: 3 * window] for each in (noise, loudest)]
    together: list[Any] = listener.start(len(streams))
    alone = [listener.start() for _ in streams]
    worst = 0.0
    for place in range(0, 3 * window, window):
        windows = np.stack([each[place : place + window] for each in streams])
        log_probs, lengths, *together = listener.step(windows, together)
        if log_probs.shape != (len(streams), window // folder.subsampling_factor, classes):
            wanted = (len(streams), window // folder.subsampling_factor, classes)
            raise UserError(f"{path}: logprobs: got shape {log_probs.shape}, wanted {wanted}")
        if not all(np.isfinite(each).all() for each in (log_probs, *together[:2])):
            raise UserError(f"{path}: gives values that are not finite")
        if np.abs(np.exp(log_probs.astype(np.float64)).sum(2) - 1).max() > 1e-3:
            raise UserError(f"{path}: logprobs: got what does not sum to 1, wanted log-probabilities")
        if (lengths != window // folder.subsampling_factor).any():
            raise UserError(f"{path}: encoded_lengths: got {lengths.tolist()}, wanted all frames of a whole window")
        for row in range(len(streams)):
            own, _, *alone[row] = listener.step(windows[row : row + 1], alone[row])
            worst = max(worst, float(np.abs(own[0] - log_probs[row]).max()))
    # int8 rounds the values of a batch by what is largest in it
    if path.name == "model.onnx" and worst > _TOLERANCE:
        raise UserError(f"{path}: answers differ by {worst:.2g} alone and in a batch, wanted at most {_TOLERANCE}")
    return f"alone and in a batch differ by {worst:.1g}"


def _self_test(folder: ExportedFolder, listener: Listener, clip: Path, name: str) -> str:
    """Refuse a model that hears another text in the clip than at its export; return the text."""
    import soundfile

    try:
        about = soundfile.info(os.fspath(clip))
        if (about.samplerate, about.channels) != (SAMPLE_RATE, 1) or about.duration > _LONGEST_CLIP:
            raise UserError(f"{clip}: got {about.samplerate} Hz, {about.channels} channels, {about.duration:.0f} s")
        samples, _ = soundfile.read(os.fspath(clip), dtype="float32")
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{clip}: is no audio: {_line(error)}") from None
    wanted, got = folder.self_test["text"][name], heard_text(listener, samples, folder.symbols)
    if got != wanted:
        raise UserError(f"{listener.path}: hears {got!r} in {clip.name}, heard {wanted!r} at its export")
    return repr(got) if got else "'' (it hears nothing in its own clip: was it trained?)"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
