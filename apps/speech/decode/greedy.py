"""The best path: the most probable class of each frame, blanks and repeats collapsed. No torch."""

from __future__ import annotations

import numpy as np

from apps.speech.decode.ctc import Hypothesis, check_log_probs


class GreedyStream:
    """The best path of audio that comes in packets; what it is does not depend on how the frames are split.

    Its state is the class of the last frame, the frames so far and their score; ``accept`` hands out what is new.
    """

    def __init__(self) -> None:
        self._last = -1
        self._count = 0
        self._classes: int | None = None

    def accept(self, log_probs: np.ndarray) -> Hypothesis:
        """Return the symbols that start in these frames; the score is that of the best path through these frames.

        Raises:
            ValueError: as ``check_log_probs``, or another number of classes than before.
        """
        values = check_log_probs(log_probs, self._classes)
        self._classes = values.shape[1]
        if not len(values):
            return Hypothesis((), 0.0, (), ())
        path = values.argmax(axis=1)
        starts = (path != np.concatenate([[self._last], path[:-1]])) & (path != values.shape[1] - 1)
        frames = np.flatnonzero(starts)
        ids = path[frames]
        probabilities = np.exp(values[frames, ids])
        score = float(values[np.arange(len(path)), path].sum())
        first, self._last, self._count = self._count, int(path[-1]), self._count + len(path)
        return Hypothesis(tuple(ids.tolist()), score, tuple((frames + first).tolist()), tuple(probabilities.tolist()))


def greedy(log_probs: np.ndarray) -> Hypothesis:
    """Return the best path of ``log_probs`` [T, C]; a frame is the first of a run of its symbol.

    The score is the path's, not that of all paths with these symbols (``ctc_log_probability``).

    Raises:
        ValueError: as ``check_log_probs``.
    """
    return GreedyStream().accept(log_probs)
