"""What a Hugging Face folder holds, told without its weights being loaded: whether it can teach, its name. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apps.speech.device.folder import sha256
from apps.speech.features import SAMPLE_RATE
from kdcore.config import UserError
from kdcore.run import fingerprint

# model_type in config.json -> (its configuration, its CTC model) in transformers; no other class is ever made
MODELS = {
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC"),
    "hubert": ("HubertConfig", "HubertForCTC"),
    "wavlm": ("WavLMConfig", "WavLMForCTC"),
}
# one of their frames: samples from one to the next, and samples it hears
HOP, WINDOW = 320, 400
NO_TRANSFORMERS = "a Hugging Face teacher needs transformers; pip install 'transformers>=5'"
_LARGEST_JSON = 1 << 24
_BOUNDARY = "▁"
# settings, vocabularies and shards: what a teacher is made of; notes and pictures beside them are not
_READ = (".json", ".txt", ".safetensors")


def check_folder(path: str | Path) -> None:
    """Refuse a folder that ``HuggingFaceCtc.from_folder`` would refuse whatever the units; takes milliseconds.

    Raises:
        UserError: no folder, a missing or malformed file, another kind of model, one without a CTC head, pickled
            weights only, or no transformers to load it with.
    """
    folder = Path(path)
    config = read_config(folder)
    normalises(folder)
    weight_files(folder)
    token_groups(folder, config, ())
    if find_spec("transformers") is None:
        raise UserError(NO_TRANSFORMERS)


def folder_fingerprint(path: str | Path) -> str:
    """Return 16 hex digits that change with any weight or setting in a folder, under whatever path; about 1 s a GB.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        files = [each for each in sorted(Path(path).iterdir()) if each.suffix in _READ and each.is_file()]
        return fingerprint({file.name: sha256(file) for file in files})
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from None


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON object of a folder."""
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise UserError(f"{file}: larger than {_LARGEST_JSON >> 20} MB, wanted a JSON file of settings")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: wanted a JSON object, got {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json, of a model that can teach.

    Raises:
        UserError: no such folder or file, another kind of model, no CTC head, or frames of another length.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: not a folder, wanted one with a Hugging Face model (config.json, model.safetensors)"
        )
    file = folder / "config.json"
    config = _json(file)
    kind = config.get("model_type")
    if kind not in MODELS:
        raise UserError(f"{file}: model_type: got {kind!r}, wanted one of {', '.join(MODELS)}")
    if config.get("architectures") != [MODELS[kind][1]]:
        raise UserError(
            f"{file}: no CTC head: architectures: got {config.get('architectures')}, wanted ['{MODELS[kind][1]}']"
        )
    for name in ("quantization_config", "adapter_attn_dim", "auto_map"):
        if config.get(name) is not None:
            raise UserError(f"{file}: {name}: models with one are not read, wanted a plain {MODELS[kind][1]}")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder / 'adapter_config.json'}: the folder holds an adapter, wanted a whole model")
    strides, kernels = (
        config.get("conv_stride", [5, 2, 2, 2, 2, 2, 2]),
        config.get("conv_kernel", [10, 3, 3, 3, 3, 2, 2]),
    )
    for name, values in (("conv_stride", strides), ("conv_kernel", kernels)):
        if not isinstance(values, list) or not all(type(each) is int and 0 < each <= HOP for each in values):
            raise UserError(f"{file}: {name}: got {values!r}, wanted a list of whole numbers from 1 to {HOP}")
    if (math.prod(strides), _window(kernels, strides)) != (HOP, WINDOW):
        got = f"{math.prod(strides)} samples, of {_window(kernels, strides)}"
        raise UserError(f"{file}: conv_stride, conv_kernel: got a frame each {got}, wanted {HOP}, of {WINDOW}")
    return config


def _window(kernels: list[int], strides: list[int]) -> int:
    """Return the samples that one frame of a stack of convolutions hears."""
    window = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=False):
        window = (window - 1) * stride + kernel
    return window


def normalises(folder: Path) -> bool:
    """Return whether samples are normalised; so they are where no file says otherwise, as in transformers."""
    file = folder / "preprocessor_config.json"
    if not file.exists():
        return True
    values = _json(file)
    rate, normalise = values.get("sampling_rate", SAMPLE_RATE), values.get("do_normalize", True)
    if rate != SAMPLE_RATE:
        raise UserError(f"{file}: sampling_rate: got {rate!r}, wanted {SAMPLE_RATE}")
    if not isinstance(normalise, bool):
        raise UserError(f"{file}: do_normalize: got {normalise!r}, wanted true or false")
    return normalise


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights; a folder without safetensors is refused, and an index that names others."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = _json(index).get("weight_map")
        files = set(map(str, names.values())) if isinstance(names, dict) else set()
        for name in sorted(files):
            if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
                raise UserError(f"{index}: weight_map: got {name!r}, wanted safetensors files in its folder")
        if files:
            return [folder / name for name in sorted(files)]
    if not (folder / "model.safetensors").is_file():
        pickled = sorted(each.name for each in folder.iterdir() if each.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        why = (
            f"only pickled weights ({pickled[0]}), which can run code; save them as"
            if pickled
            else "no weights, wanted"
        )
        raise UserError(f"{folder}: {why} model.safetensors")
    return [folder / "model.safetensors"]


def size(path: str | Path) -> tuple[int, int]:
    """Return the number of weights that a folder stores, and the bytes of their files; none of them is loaded.

    Raises:
        UserError: no safetensors, or files that are none.
    """
    from safetensors import SafetensorError, safe_open

    files, weights = weight_files(Path(path)), 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as stored:
                weights += sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: {' '.join(str(error).split())}") from None
    return weights, sum(file.stat().st_size for file in files)


def token_groups(folder: Path, config: Mapping[str, Any], symbols: Sequence[str]) -> list[list[int]]:
    """Return the ids of the tokens that make each symbol, and last those that count as the blank.

    Raises:
        UserError: no vocabulary, one of several languages, no blank, or symbols without a token (named).
    """
    file = folder / "vocab.json"
    vocabulary = _json(file)
    size, blank = config.get("vocab_size", 32), config.get("pad_token_id", 0)
    if not all(type(each) is int for each in vocabulary.values()):
        raise UserError(f"{file}: wanted ids by token, as of one language")
    settings = folder / "tokenizer_config.json"
    delimiter = (_json(settings) if settings.exists() else {}).get("word_delimiter_token", "|")
    places = {symbol: at for at, symbol in enumerate(symbols)}
    found: list[list[int]] = [[] for _ in symbols]
    silent = set(range(size)) if type(size) is int and 0 < size <= len(vocabulary) + 1024 else set()
    if blank not in silent:
        raise UserError(f"{folder / 'config.json'}: pad_token_id, the blank: got {blank!r} of vocab_size {size!r}")
    for token, number in vocabulary.items():
        name = _BOUNDARY if token == delimiter else token
        place = next((places[each] for each in (name, name.lower(), name.upper()) if each in places), None)
        if place is not None and number in silent and number != blank:
            found[place].append(number)
            silent.remove(number)
    missing = [symbol for symbol, ids in zip(symbols, found, strict=True) if not ids]
    if missing:
        names = " ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        raise UserError(f"{file}: has no token for {len(missing)} of the {len(symbols)} symbols: {names}")
    return [*found, sorted(silent)]
