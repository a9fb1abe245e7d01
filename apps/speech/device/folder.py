"""An exported folder: what is in it, and the refusal of one that is not whole. No torch.

``kdsuite.json`` describes the model and lists every other file with its size and SHA-256. Opening a folder reads that
and ``tokens.txt`` and looks at sizes; hashes are compared when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from apps.speech.text import TextRules
from kdcore.config import UserError

FORMAT = 1
ABOUT, TOKENS, CARD, CLIP = "kdsuite.json", "tokens.txt", "README.md", "self_test.wav"
# weights in float32, and in int8
MODEL, INT8_MODEL = "model.onnx", "model.int8.onnx"
MODELS = (MODEL, INT8_MODEL)
BLANK = "<blk>"
# of a feature frame
_FEATURE_MS = 10
# of a step, in this order (SPEECH_EXPORT.md); the blank is the last class of ``logprobs`` [N, T', C]
INPUTS = ("audio_signal", "length", "cache_last_channel", "cache_last_time", "cache_last_channel_len")
OUTPUTS = ("logprobs", "encoded_lengths", *(f"{name}_next" for name in INPUTS[2:]))

# no description or list of symbols comes near these
_LARGEST_ABOUT, _LARGEST_TOKENS = 1 << 20, 1 << 24
_LARGEST_NUMBER = 1e9
# how long a streaming model may be behind a word, in ms
_LONGEST_DELAY = 2000
_OF_DESKTOPS = (".DS_Store", "Thumbs.db", "desktop.ini")
_HEX = frozenset("0123456789abcdef")
_RULES = tuple(each.name for each in fields(TextRules))


@dataclass(frozen=True)
class Listed:
    """A file as the folder's list has it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportedFolder:
    """What ``kdsuite.json`` says of a folder, and the symbols of its model.

    Attributes:
        path: the folder.
        name: what the model is called.
        kind: the kind of network.
        parameters: the number of its weights.
        units: ``characters`` or ``pieces``.
        sample_rate: of the audio, in Hz.
        window_size, chunk_shift: feature frames of 10 ms that a step takes, and by which the next one goes on.
        subsampling_factor: feature frames to a frame of ``logprobs``.
        chunk_ms: milliseconds of audio a step.
        look_ahead_ms: milliseconds behind a frame that it may depend on.
        delay_ms: how long after the teacher's words this model emits them, which is taken off their times.
        confidence: slope and offset that make a word's confidence a probability; None where none were fitted.
        confidence_lm: the same of words that a lexicon and a language model chose; None also in earlier exports.
        decode: settings of the run that are of use in decoding.
        text: how the transcripts were normalised that it was trained on; the default rules in earlier exports.
        self_test: {"audio": file, "text": {model file: what it hears there}}.
        files: every other file of the folder by name.
        symbols: the symbols by id; the blank's id is their number.
    """

    path: Path
    name: str
    kind: str
    parameters: int
    units: str
    sample_rate: int
    window_size: int
    chunk_shift: int
    subsampling_factor: int
    chunk_ms: int
    look_ahead_ms: int
    delay_ms: int
    confidence: dict[str, float] | None
    confidence_lm: dict[str, float] | None
    decode: dict[str, Any]
    text: TextRules
    self_test: dict[str, Any]
    files: dict[str, Listed]
    symbols: tuple[str, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> ExportedFolder:
        """Return a folder whose files are all there with the sizes they should have; ``verify`` compares hashes too.

        Raises:
            UserError: a file is missing, leads elsewhere, is larger or smaller than it was written, or changed;
                ``kdsuite.json`` or ``tokens.txt`` are not what an export writes. The message names the file.
        """
        root = Path(path)
        about = _read_about(root)
        for name, listed in about["files"].items():
            _check_file(root, name, listed)
            if verify:
                _check_hash(root, name, listed)
        return cls(path=root, **about, symbols=_read_tokens(root / TOKENS))

    @property
    def blank(self) -> int:
        """The id of the blank."""
        return len(self.symbols)

    @property
    def models(self) -> tuple[str, ...]:
        """The model files that are here."""
        return tuple(name for name in MODELS if name in self.files)

    def model(self, int8: bool) -> Path:
        """Return the file of the model with int8 weights or with float32 ones.

        UserError where it was left out; the message says how the other one is asked for.
        """
        name = INT8_MODEL if int8 else MODEL
        if name not in self.files:
            how = "--fp32 runs it" if int8 else "it runs without --fp32"
            raise UserError(f"{self.path / name}: was not exported; the folder has {', '.join(self.models)}: {how}")
        return self.path / name

    def calibration(self, *, lexicon: bool) -> dict[str, float] | None:
        """Return slope and offset for words of a ``lexicon`` or of best paths; those of best paths where no other."""
        return self.confidence_lm if lexicon and self.confidence_lm else self.confidence

    def verify(self, *names: str) -> None:
        """Raise UserError if one of these files was changed since the export, or comes from another one."""
        for name in names:
            _check_hash(self.path, name, self.files[name])

    def extra_files(self) -> list[str]:
        """Return the names of what is in the folder and not in its list, but for what desktops leave in folders."""
        known = {*self.files, ABOUT, *_OF_DESKTOPS}
        return sorted(each.name for each in self.path.iterdir() if each.name not in known)


def is_export(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder is described by a ``kdsuite.json`` that an export wrote, whole or not."""
    try:
        _read_about(Path(path))
    except UserError:
        return False
    return True


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_about(root: Path) -> dict[str, Any]:
    """Return the fields of ``kdsuite.json``, checked."""
    file = root / ABOUT
    if not root.is_dir():
        raise UserError(f"{root}: {'is a file' if root.exists() else 'does not exist'}; wanted an exported folder")
    if not file.exists() and not file.is_symlink():
        raise UserError(f"{root}: no exported model here ({ABOUT} is missing)")
    text = _read(file, _LARGEST_ABOUT)
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: wanted an object, got {type(values).__name__}")
    if values.get("format") != FORMAT or isinstance(values["format"], bool):
        raise UserError(f"{file}: format: got {_shown(values.get('format'))}, wanted {FORMAT}, as this version writes")
    found = {}
    for name, (wanted, fits) in _FIELDS.items():
        if name not in values and name in _LATER:
            values[name] = None
        if name not in values:
            raise UserError(f"{file}: {name}: is missing, wanted {wanted}")
        if not fits(values[name]):
            raise UserError(f"{file}: {name}: got {_shown(values[name])}, wanted {wanted}")
        found[name] = values[name]
    found["files"] = {name: Listed(each["bytes"], each["sha256"]) for name, each in found["files"].items()}
    found["text"] = TextRules(**(found["text"] or {}))
    _check_together(file, found)
    return found


def _check_together(file: Path, found: Mapping[str, Any]) -> None:
    """Raise UserError for fields that do not go together."""
    files, factor, test = found["files"], found["subsampling_factor"], found["self_test"]
    for name in (TOKENS, *([] if set(files) & set(MODELS) else MODELS[:1]), CARD):
        if name not in files:
            raise UserError(f"{file}: files: {name} is not among them")
    if found["chunk_shift"] % factor or found["window_size"] < found["chunk_shift"]:
        got = f"{found['window_size']} and {found['chunk_shift']}"
        raise UserError(
            f"{file}: window_size, chunk_shift: got {got}, wanted multiples of {factor}, the first not less"
        )
    if found["chunk_ms"] != _FEATURE_MS * found["chunk_shift"]:
        wanted = f"{_FEATURE_MS * found['chunk_shift']}, as chunk_shift has it"
        raise UserError(f"{file}: chunk_ms: got {found['chunk_ms']}, wanted {wanted}")
    # what comes in one window with a frame but behind it, in whole frames of log-posteriors
    step, most = _FEATURE_MS * factor, _FEATURE_MS * (found["window_size"] - factor)
    if found["look_ahead_ms"] % step or found["look_ahead_ms"] > most:
        wanted = f"a multiple of {step} up to {most}, the rest of a window"
        raise UserError(f"{file}: look_ahead_ms: got {found['look_ahead_ms']}, wanted {wanted}")
    if test["audio"] not in files or set(test["text"]) - set(files):
        raise UserError(f"{file}: self_test: names files that are not among 'files'")
    for name in MODELS:
        if name in files and name not in test["text"]:
            raise UserError(f"{file}: self_test: has no text of {name}; wanted one of every model")


def _check_file(root: Path, name: str, listed: Listed) -> None:
    """Raise UserError if a file of the list is not in the folder itself, or has another size."""
    path = root / name
    try:
        about = path.lstat()
        if stat.S_ISLNK(about.st_mode):
            _refuse_link(path)
            about = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; {ABOUT} lists it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{path}: is no file")
    if about.st_size != listed.bytes:
        what = "is truncated" if about.st_size < listed.bytes else "is not the file that was exported"
        raise UserError(f"{path}: {what}: it has {about.st_size:,} bytes, {ABOUT} says {listed.bytes:,}")


def _check_hash(root: Path, name: str, listed: Listed) -> None:
    if sha256(root / name) != listed.sha256:
        raise UserError(f"{root / name}: was changed since the export: its SHA-256 is not that of {ABOUT}")


def _refuse_link(path: Path) -> None:
    """Raise UserError for a link to a file of another folder; one that leads nowhere is found missing later."""
    if path.is_symlink() and os.path.dirname(os.path.realpath(path)) != os.path.realpath(path.parent):
        raise UserError(f"{path}: is a link that leads out of the folder")


def _read(path: Path, largest: int) -> str:
    """Return the text of a file in the folder itself, of at most so many bytes."""
    _refuse_link(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is no file' if path.exists() else 'is missing'}")
    try:
        with open(path, "rb") as handle:
            data = handle.read(largest + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > largest:
        raise UserError(f"{path}: is larger than {largest >> 20} MiB, which no export writes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def _read_tokens(path: Path) -> tuple[str, ...]:
    """Return the symbols of ``SYMBOL ID`` lines, the blank last, without it."""
    lines = _read(path, _LARGEST_TOKENS).removesuffix("\n").split("\n")
    symbols: dict[str, None] = {}
    for number, line in enumerate(lines):
        symbol, _, at = line.rstrip("\r").rpartition(" ")
        if at != str(number) or symbol.split() != [symbol] or symbol in symbols:
            raise UserError(
                f"{path}: line {number + 1}: got {_shown(line)}, wanted a symbol not seen before and {number}"
            )
        symbols[symbol] = None
    *others, last = symbols
    if last != BLANK or BLANK in others or not others:
        raise UserError(f"{path}: line {len(lines)}: got {_shown(last)}, wanted {BLANK} there and symbols before it")
    return tuple(others)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is no number")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:
    # JSON's 1e999 is infinity, and its integers have no end
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def _confidence(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != {"slope", "offset"} or not all(map(_number, value.values())):
        return False
    return bool(value["slope"] > 0)  # or words that are surer would be less so


def _text_rules(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict) and set(value) == set(_RULES) and all(isinstance(each, bool) for each in value.values())
    )


def _self_test(value: Any) -> bool:
    if not isinstance(value, dict) or not _text(value.get("audio")) or not isinstance(value.get("text"), dict):
        return False
    return bool(value["text"]) and all(map(_text, value["text"].values()))


def _files(value: Any) -> bool:
    """Return whether it is a list of files: plain names, so that none lies elsewhere, with sizes and hashes."""
    if not isinstance(value, dict) or not 0 < len(value) <= 1000:
        return False
    size = _count(0, 1 << 40)
    for name, each in value.items():
        if not name or name in (".", "..", ABOUT) or set(name) & set("/\\\0") or not isinstance(each, dict):
            return False
        digest = each.get("sha256")
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - _HEX or not size(each.get("bytes")):
            return False
    return True


# fields that earlier exports lack, where null says the same
_LATER = ("confidence_lm", "text")
# name -> (what is wanted, whether a value is that)
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("text", _text),
    "kind": ("text", _text),
    "parameters": ("a number of weights", _count(1, 1 << 40)),
    "units": ("characters or pieces", lambda value: value in ("characters", "pieces")),
    "sample_rate": ("16000", lambda value: value == 16_000 and _number(value)),
    "window_size": ("a number of feature frames", _count(1, 1 << 16)),
    "chunk_shift": ("a number of feature frames", _count(1, 1 << 16)),
    "subsampling_factor": ("4", lambda value: value == 4 and _number(value)),
    "chunk_ms": ("milliseconds", _count(1, 1 << 20)),
    "look_ahead_ms": ("milliseconds", _count(0, 1 << 20)),
    "delay_ms": (f"milliseconds, at most {_LONGEST_DELAY}", _count(0, _LONGEST_DELAY)),
    "confidence": ("slope above 0 and offset, or null", _confidence),
    "confidence_lm": ("slope above 0 and offset, or null", _confidence),
    "decode": ("settings", lambda value: isinstance(value, dict)),
    "text": (f"true or false for each of {', '.join(_RULES)}", _text_rules),
    "self_test": ("a file and the text of each model", _self_test),
    "files": ("names of files in this folder with bytes and sha256", _files),
}
