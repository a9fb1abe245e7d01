"""Images of digits: scikit-learn's (8 x 8, they come with it) and MNIST's test set (from KD_DATA, at 14 x 14)."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcore.config import UserError
from kdcore.folders import data_folder

CLASSES = 10
# training and validation rows; all others are the test set
SIZES = {"digits": (400, 300), "mnist": (1000, 1000)}


@dataclass(frozen=True)
class Split:
    """One random split: ``inputs`` float32 [N, 1, H, W] in 0..1 and ``labels`` int64 [N] of each part."""

    train: dict[str, Tensor]
    valid: dict[str, Tensor]
    test: dict[str, Tensor]


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images float32 [N, H, W] in 0..1 and labels int64 [N].

    Raises:
        UserError: MNIST is not in KD_DATA, or its files are not what they should be.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
    folder = data_folder() / "multimodal" / "mnist"
    if not folder.is_dir():
        raise UserError(f"{folder}: not there; set KD_DATA to the folder that holds multimodal/mnist")
    images = _idx(folder / "t10k-images-idx3-ubyte.gz", 3)
    # means of 2 x 2 pixels: the study's networks read them as well, in a quarter of the time
    small = images.reshape(len(images), 14, 2, 14, 2).mean((2, 4)) / 255
    return small.astype(np.float32), _idx(folder / "t10k-labels-idx1-ubyte.gz", 1).astype(np.int64)


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of bytes (the format of the MNIST database)."""
    raw = gzip.decompress(path.read_bytes())
    if len(raw) < 4 + 4 * dimensions or raw[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path}: not an IDX file of bytes with {dimensions} dimension(s)")
    shape = np.frombuffer(raw, ">i4", dimensions, 4)
    values = np.frombuffer(raw, np.uint8, -1, 4 + 4 * dimensions)
    if values.size != int(np.prod(shape)):
        raise UserError(f"{path}: holds {values.size} bytes, its head says {tuple(shape.tolist())}")
    return values.reshape(shape)


def split(name: str, seed: int) -> Split:
    """Return a random split of a data set into training, validation and test rows."""
    images, labels = load(name)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, valid = SIZES[name]
    parts = np.split(order, [train, train + valid])
    return Split(*(_part(images[rows], labels[rows]) for rows in parts))


def _part(images: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    return {"inputs": torch.from_numpy(images)[:, None], "labels": torch.from_numpy(labels)}


def strips(part: dict[str, Tensor], count: int, digits: int, seed: int) -> dict[str, Tensor]:
    """Return random strips of digits side by side: ``inputs`` [N, 1, H, W * digits], ``labels`` [N, digits] from 1.

    0 is the blank of CTC. Strips of a part hold digits of that part alone.
    """
    rows = torch.from_numpy(np.random.default_rng(seed).integers(0, len(part["labels"]), (count, digits)))
    images = torch.cat(list(part["inputs"][rows].unbind(1)), 3)
    return {"inputs": images, "labels": part["labels"][rows] + 1}
