"""Features of a corpus under one view, computed once, on disk and memory-mapped: any size, read by rows of frames."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apps.speech.features import FEATURES, fbank
from kdcore.config import UserError
from kdcore.locks import beside, locked
from kdcore.run import read_json, write_json

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FeatureStore:
    """``frames`` float32 [sum of T, 80], memory-mapped; utterance i has rows ``offsets[i]:offsets[i + 1]``."""

    folder: Path
    frames: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.frames[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Feature frames of every utterance, int64 [N]."""
        return np.diff(self.offsets)

    def statistics(self, utterances: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of every bin, float32 [80] twice, in one pass over blocks.

        They are of the first so many utterances, or of all.
        """
        end = int(self.offsets[len(self) if utterances is None else utterances])
        total, squares, count = np.zeros(FEATURES), np.zeros(FEATURES), 0
        for start in range(0, end, 100_000):
            block = self.frames[start : min(start + 100_000, end)].astype(np.float64)
            total, squares, count = total + block.sum(0), squares + (block**2).sum(0), count + len(block)
        mean = total / max(count, 1)
        deviation = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0.0))
        return mean.astype(np.float32), deviation.astype(np.float32)


def open_store(folder: str | os.PathLike[str], key: str) -> FeatureStore | None:
    """Return the store in a folder if it is whole and of this key; None otherwise."""
    path = Path(folder)
    try:
        about = read_json(path / "store.json")
        offsets = np.load(path / "offsets.npy", allow_pickle=False)
        if about != {"key": key, "utterances": len(offsets) - 1, "frames": int(offsets[-1])}:
            return None
        if (path / "frames.f32").stat().st_size != int(offsets[-1]) * FEATURES * 4:
            return None
    except (OSError, ValueError, IndexError):
        return None
    if offsets[-1] == 0:
        return FeatureStore(path, np.zeros((0, FEATURES), np.float32), offsets)
    return FeatureStore(
        path, np.memmap(path / "frames.f32", np.float32, "r", shape=(int(offsets[-1]), FEATURES)), offsets
    )


def build_store(
    folder: str | os.PathLike[str], key: str, audio: Iterable[np.ndarray], count: int, progress: Progress | None = None
) -> FeatureStore:
    """Return the store of ``count`` utterances' samples, float32 [n] each at 16 kHz; what is there already is kept.

    Memory is that of one utterance. A kill leaves nothing that reads as whole; two commands do not build it twice.

    Raises:
        UserError: the disk has no room.
        ValueError: ``audio`` gives another number of utterances.
    """
    found = open_store(folder, key)
    if found is not None:
        return found
    path = Path(folder)
    with locked(beside(path)):
        found = open_store(path, key)  # another command may have made it meanwhile
        return _built(path, key, audio, count, progress) if found is None else found


def _built(path: Path, key: str, audio: Iterable[np.ndarray], count: int, progress: Progress | None) -> FeatureStore:
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    offsets = [0]
    try:
        with open(partial / "frames.f32", "wb") as out:
            for done, samples in enumerate(audio, 1):
                features = fbank(samples)
                out.write(features.tobytes())
                offsets.append(offsets[-1] + len(features))
                if progress is not None:
                    progress(done, count)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        if error.filename is not None:  # an audio file's, not the store's
            raise
        raise UserError(f"{path}: no room for the features ({error.strerror})") from None
    if len(offsets) != count + 1:
        raise ValueError(f"audio: wanted {count} utterances, got {len(offsets) - 1}")
    np.save(partial / "offsets.npy", np.array(offsets, np.int64), allow_pickle=False)
    write_json(partial / "store.json", {"key": key, "utterances": count, "frames": offsets[-1]})
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    opened = open_store(path, key)
    if opened is None:
        raise UserError(f"{path}: written, but cannot be read back")
    return opened
