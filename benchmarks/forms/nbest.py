"""The teacher's best label sequences of a few frames, exactly: all paths over its best symbols, scored by CTC."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

# symbols tried a frame
SYMBOLS = 3


def of_rows(logits: Tensor, count: int) -> dict[str, Tensor]:
    """Return the ``count`` best label sequences of every row of logits [B, T, C] (blank 0), padded with 0.

    Returns hypotheses int64 [B, N, U], hypothesis_lengths [B, N] and log_scores [B, N]; a row with fewer has the rest
    empty, with a score of -1e4.
    """
    log_probs = torch.log_softmax(logits.float(), 2)
    listed = [_best(row, count) for row in log_probs]
    longest = max(1, max(len(labels) for row in listed for labels, _ in row))
    hypotheses = torch.zeros(len(listed), count, longest, dtype=torch.int64)
    lengths = torch.zeros(len(listed), count, dtype=torch.int64)
    scores = torch.full((len(listed), count), -1e4)
    for b, row in enumerate(listed):
        for n, (labels, score) in enumerate(row):
            hypotheses[b, n, : len(labels)] = torch.tensor(labels, dtype=torch.int64)
            lengths[b, n], scores[b, n] = len(labels), score
    return {"hypotheses": hypotheses, "hypothesis_lengths": lengths, "log_scores": scores}


def of_halves(logits: Tensor, count: int) -> dict[str, Tensor]:
    """Return the best sequences of the first and of the second half of the frames, as two segments [B, 2, ...]."""
    frames = logits.shape[1]
    middle = frames // 2
    halves = [of_rows(logits[:, :middle], count), of_rows(logits[:, middle:], count)]
    longest = max(half["hypotheses"].shape[2] for half in halves)
    padded = [F.pad(half["hypotheses"], (0, longest - half["hypotheses"].shape[2])) for half in halves]
    bounds = torch.tensor([[0, middle], [middle, frames]]).expand(len(logits), 2, 2).clone()
    return {
        "segments": bounds,
        "hypotheses": torch.stack(padded, 1),
        "hypothesis_lengths": torch.stack([half["hypothesis_lengths"] for half in halves], 1),
        "log_scores": torch.stack([half["log_scores"] for half in halves], 1),
    }


def _best(log_probs: Tensor, count: int) -> list[tuple[tuple[int, ...], float]]:
    """Return the best label sequences of one row [T, C] with their log-probabilities, best first."""
    tried = log_probs.topk(SYMBOLS, 1).indices.tolist()
    candidates = sorted({_collapsed(path) for path in product(*tried)})
    sizes = torch.tensor([len(labels) for labels in candidates])
    flat = torch.tensor([symbol for labels in candidates for symbol in labels], dtype=torch.int64)
    frames = torch.full((len(candidates),), len(log_probs))
    losses = F.ctc_loss(
        log_probs[:, None].expand(-1, len(candidates), -1).contiguous(), flat, frames, sizes, reduction="none"
    )
    order = losses.argsort()[:count].tolist()
    return [(candidates[place], -float(losses[place])) for place in order]


def _collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(symbol for place, symbol in enumerate(path) if symbol and (place == 0 or symbol != path[place - 1]))
