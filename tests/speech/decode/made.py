"""Posteriors made from random alignments of texts: what a decoder meets, without a model."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from apps.speech.decode.beam import PrefixSearch, Scorer
from apps.speech.decode.ctc import Hypothesis
from kdcore.config import UserError

AN4 = Path(os.environ.get("KD_DATA", "../shared/data")) / "speech" / "an4"
LETTERS = (*"abcdefghijklmnopqrstuvwxyz'", "▁")


@dataclass(frozen=True)
class Characters:
    """Characters, with the boundary as a symbol of its own between words."""

    symbols: tuple[str, ...] = LETTERS

    def encode(self, text: str) -> list[int]:
        ids = []
        for character in "▁".join(text.split()):
            if character not in self.symbols:
                raise UserError(f"{character!r} is not among the units")
            ids.append(self.symbols.index(character))
        return ids


@dataclass(frozen=True)
class Pieces:
    """Word pieces with the boundary in front of a word; the longest piece that fits is taken."""

    symbols: tuple[str, ...] = ("▁yes", "▁no", "▁n", "ine", "o", "▁on", "e", "▁", "t", "w", "▁t")

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            rest = "▁" + word
            while rest:
                fitting = [piece for piece in self.symbols if rest.startswith(piece)]
                if not fitting:
                    raise UserError(f"{rest[0]!r} is not among the units")
                piece = max(fitting, key=len)
                ids.append(self.symbols.index(piece))
                rest = rest[len(piece) :]
        return ids


def posteriors(
    ids: list[int], classes: int, rng: np.random.Generator, *, noise: float = 1.0, sure: float = 6.0
) -> np.ndarray:
    """Return log_probs float32 [T, C] of a random alignment of ``ids``: blanks, repeats, and noise on the logits."""
    path = [classes - 1] * int(rng.integers(0, 4))
    for before, symbol in itertools.pairwise([-1, *ids]):
        path += [classes - 1] * max(int(rng.integers(0, 3)), int(symbol == before))
        path += [symbol] * int(rng.integers(1, 3))
    path += [classes - 1] * int(rng.integers(0, 4))
    logits = noise * rng.standard_normal((len(path), classes))
    logits[np.arange(len(path)), path] += sure
    return normalise(logits)


def noisy(frames: int, classes: int, rng: np.random.Generator, scale: float = 2.0) -> np.ndarray:
    """Return log_probs float32 [T, C] of random logits."""
    return normalise(scale * rng.standard_normal((frames, classes)))


def normalise(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float32)


def an4_texts(split: str) -> list[str]:
    """Return the texts of AN4, or skip."""
    file = AN4 / f"{split}.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def enumerate_all(log_probs: np.ndarray) -> dict[tuple[int, ...], float]:
    """Return log P of every sequence, by listing all C ** T paths."""
    frames, classes = log_probs.shape
    total: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(classes), repeat=frames):
        ids = tuple(k for k, _ in itertools.groupby(path) if k != classes - 1)
        score = float(sum(log_probs[t, k] for t, k in enumerate(path)))
        total[ids] = float(np.logaddexp(total.get(ids, -np.inf), score))
    return total


def beam_search(log_probs: np.ndarray, scorer: Scorer | None = None, *, n: int = 1, beam: int = 16) -> list[Hypothesis]:
    """Return the at most ``n`` best symbol sequences of whole posteriors, as a stream of one packet gives them."""
    search = PrefixSearch(log_probs.shape[1], scorer, beam=beam)
    search.accept(log_probs)
    return [candidate.hypothesis for candidate in search.candidates()[:n]]
