"""An exported folder made by hand: a network that hears tones as letters, and audio that speaks in them.

Its graph has what a real one has (a step, caches that matter, dynamic batch), and it errs never, so that tests of what
is around it know what to expect.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import soundfile
from onnx import TensorProto, helper, numpy_helper

from apps.speech.features import FEATURES, SAMPLE_RATE, TAIL_MS, fbank

SYMBOLS = ("▁", "a", "d", "e", "n", "o", "s", "y")
TONES = {symbol: 300.0 * 1.5**index for index, symbol in enumerate(SYMBOLS)}
CHUNK = 4
_LEVEL = -2.7  # log-mel of a tone that is heard


def tone(symbol: str, seconds: float = 0.12) -> np.ndarray:
    """Return the tone of a symbol, with soft edges."""
    count = round(seconds * SAMPLE_RATE)
    edge = np.minimum(1.0, np.minimum(np.arange(count), np.arange(count)[::-1]) / 160)
    wave = 0.3 * np.sin(2 * np.pi * TONES[symbol] * np.arange(count) / SAMPLE_RATE)
    return (edge * wave).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def noise(seconds: float, level: float = 1e-3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, level, round(seconds * SAMPLE_RATE)).astype(np.float32)


def spoken(text: str, *, before: float = 0.2, after: float = 0.2, rest: float = 0.1) -> np.ndarray:
    """Return the samples of a text; ``rest`` seconds of silence between letters."""
    parts = [silence(before)]
    for symbol in "▁".join(text.split()):
        parts += [tone(symbol), silence(rest)]
    return np.concatenate([*parts, silence(after)])


def _bins() -> np.ndarray:
    """Return float32 [80, C]: for each symbol the mean of the bins in which its tone is loudest."""
    weights = np.zeros((FEATURES, len(SYMBOLS)), np.float32)
    for place, symbol in enumerate(SYMBOLS):
        peak = int(fbank(tone(symbol, 0.5))[20].argmax())
        weights[peak - 1 : peak + 2, place] = 1 / 3
    return weights


def network(scale: float = 3.0) -> onnx.ModelProto:
    """Return the ONNX model; a frame is heard as a fifth of the one before it and four of its own."""
    window = 4 * CHUNK
    constants = {
        "pool": np.array([0, CHUNK, 4, FEATURES], np.int64),
        "flat": np.array([0, CHUNK, FEATURES], np.int64),
        "cache": np.array([0, 1, 1, FEATURES], np.int64),
        "old": np.array([0, 1, FEATURES], np.int64),
        "bins": np.concatenate([scale * _bins(), np.zeros((FEATURES, 1), np.float32)], axis=1),
        "threshold": np.array([-scale * _LEVEL] * len(SYMBOLS) + [0.0], np.float32),
        "fifth": np.array(0.2, np.float32),
        "rest": np.array(0.8, np.float32),
        "frames": np.array(CHUNK, np.int64),
        "last": np.array([CHUNK], np.int64),
        "zero": np.array([0], np.int64),
        "until": np.array([CHUNK + 1], np.int64),
        "time": np.array([1], np.int64),
        "four": np.array([4], np.int64),
        "one": np.array(1.0, np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Transpose", ["audio_signal"], ["by_time"], perm=[0, 2, 1]),
        node("Reshape", ["by_time", "pool"], ["grouped"]),
        node("ReduceMean", ["grouped", "time2"], ["pooled4"], keepdims=0),
        node("Reshape", ["pooled4", "flat"], ["pooled"]),
        node("Reshape", ["cache_last_time", "old"], ["previous"]),
        node("Concat", ["previous", "pooled"], ["joined"], axis=1),
        node("Slice", ["joined", "zero", "last", "time"], ["shifted"]),
        node("Slice", ["joined", "last", "until", "time"], ["kept"]),
        node("Mul", ["shifted", "fifth"], ["part_old"]),
        node("Mul", ["pooled", "rest"], ["part_new"]),
        node("Add", ["part_old", "part_new"], ["mixed"]),
        node("MatMul", ["mixed", "bins"], ["scores"]),
        node("Add", ["scores", "threshold"], ["logits"]),
        node("LogSoftmax", ["logits"], ["logprobs"], axis=2),
        node("Div", ["length", "four"], ["encoded_lengths"]),
        node("Add", ["cache_last_channel", "one"], ["cache_last_channel_next"]),
        node("Reshape", ["kept", "cache"], ["cache_last_time_next"]),
        node("Add", ["cache_last_channel_len", "frames"], ["cache_last_channel_len_next"]),
    ]
    constants["time2"] = np.array([2], np.int64)
    floats, whole = TensorProto.FLOAT, TensorProto.INT64
    caches: list[tuple[str, Any, list[str | int]]] = [
        ("cache_last_channel", floats, ["N", 1, 1, 1]),
        ("cache_last_time", floats, ["N", 1, 1, FEATURES]),
    ]
    caches.append(("cache_last_channel_len", whole, ["N"]))
    inputs: list[tuple[str, Any, list[str | int]]] = [
        ("audio_signal", floats, ["N", FEATURES, window]),
        ("length", whole, ["N"]),
        *caches,
    ]
    outputs: list[tuple[str, Any, list[str | int]]] = [
        ("logprobs", floats, ["N", CHUNK, len(SYMBOLS) + 1]),
        ("encoded_lengths", whole, ["N"]),
    ]
    outputs += [(f"{name}_next", kind, shape) for name, kind, shape in caches]
    graph = helper.make_graph(
        nodes,
        "tones",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    about: dict[str, int | str] = {
        "window_size": window,
        "chunk_shift": window,
        "subsampling_factor": 4,
        "vocab_size": len(SYMBOLS),
    }
    dims = {"cache_last_channel_dim": (1, 1, 1), "cache_last_time_dim": (1, 1, FEATURES)}
    about |= {f"{name}{place}": size for name, sizes in dims.items() for place, size in enumerate(sizes, start=1)}
    about |= {"model_type": "EncDecCTCModelBPE", "normalize_type": ""}
    for key, value in about.items():
        model.metadata_props.add(key=key, value=str(value))
    onnx.checker.check_model(model, full_check=True)
    return model


def export_tones(folder: Path) -> Path:
    """Write the folder and return it; both models have float32 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    data = network().SerializeToString(deterministic=True)
    for name in ("model.onnx", "model.int8.onnx"):
        (folder / name).write_bytes(data)
    lines = [f"{symbol} {index}\n" for index, symbol in enumerate((*SYMBOLS, "<blk>"))]
    (folder / "tokens.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "README.md").write_text("# tones\n", encoding="utf-8")
    soundfile.write(folder / "self_test.wav", spoken("yes no"), SAMPLE_RATE, subtype="PCM_16")
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != "kdsuite.json"
    }
    about = {
        "format": 1,
        "name": "tones",
        "kind": "conv_rnn",
        "parameters": FEATURES * (len(SYMBOLS) + 1),
        "units": "characters",
        "sample_rate": SAMPLE_RATE,
        "window_size": 4 * CHUNK,
        "chunk_shift": 4 * CHUNK,
        "subsampling_factor": 4,
        "chunk_ms": 40 * CHUNK,
        "look_ahead_ms": 0,
        "delay_ms": 0,
        "confidence": {"slope": 0.5, "offset": 0.25},
        "decode": {},
        "self_test": {
            "audio": "self_test.wav",
            "text": {"model.onnx": "yes no", "model.int8.onnx": "yes no"},
        },
        "files": files,
    }
    (folder / "kdsuite.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return folder


def with_tail(samples: np.ndarray) -> np.ndarray:
    """Return samples with the silence that a stream ends with, to whole windows, and so much that no frame is cut."""
    size = 4 * CHUNK * 160
    wanted = -(-(len(samples) + TAIL_MS * SAMPLE_RATE // 1000) // size) * size
    return np.concatenate([samples, np.zeros(wanted - len(samples) + 400, np.float32)])
