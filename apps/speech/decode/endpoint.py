"""Where an utterance ends in a stream: rules on runs of frames without a symbol, as Kaldi has them. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apps.speech.decode.ctc import FRAME_SECONDS, check_log_probs
from kdcore.config import UserError


@dataclass(frozen=True)
class Rule:
    """An utterance ends where all of this holds.

    Attributes:
        after_speech: whether a symbol must have been emitted.
        silence: seconds of frames without a symbol up to now, at least.
        length: seconds since the utterance began, at least.
    """

    after_speech: bool
    silence: float
    length: float

    def __post_init__(self) -> None:
        if not (0 <= self.silence < math.inf and 0 <= self.length < math.inf) or self.silence + self.length == 0:
            raise UserError(
                f"endpoint rule: silence, length: got {self.silence}, {self.length}, wanted seconds, not both 0"
            )


# nothing was said for 2.4 s; 1.2 s of silence after words; 20 s in any case
RULES = (Rule(False, 2.4, 0.0), Rule(True, 1.2, 0.0), Rule(False, 0.0, 20.0))


class Endpointer:
    """Finds the ends of utterances in frames that come in packets; what they are does not depend on how they are split.

    A frame is silent if the blank is its most probable class. After an end, the next utterance begins.

    Raises:
        UserError: no rules.
    """

    def __init__(self, rules: Sequence[Rule] = RULES) -> None:
        if not rules:
            raise UserError("endpoint rules: got none, wanted at least one")
        # in whole frames, so that no sum of 0.04 decides
        self._rules = [(rule.after_speech, _frames(rule.silence), _frames(rule.length)) for rule in rules]
        self._frame = self._length = self._silence = 0
        self._spoken = False

    def accept(self, log_probs: np.ndarray) -> list[int]:
        """Take frames [T, C]; return where utterances end: frames since the stream began, up to each end.

        Raises:
            ValueError: as ``check_log_probs``.
        """
        values = check_log_probs(log_probs)
        ends = []
        for silent in (values.argmax(axis=1) == values.shape[1] - 1).tolist():
            self._frame += 1
            self._length += 1
            self._silence = self._silence + 1 if silent else 0
            self._spoken = self._spoken or not silent
            if any(
                (self._spoken or not after_speech) and self._silence >= silence and self._length >= length
                for after_speech, silence, length in self._rules
            ):
                ends.append(self._frame)
                self._length = self._silence = 0
                self._spoken = False
        return ends


def _frames(seconds: float) -> int:
    return math.ceil(round(seconds / FRAME_SECONDS, 6))
