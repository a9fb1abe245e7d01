"""What a recogniser is to listen for: best path, beam, hot words, a closed word list, a language model. No torch.

The decoders are those of ``apps.speech.decode``; here they are given one face, a search of one segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from apps.speech.decode.beam import PrefixSearch
from apps.speech.decode.confidence import Calibration
from apps.speech.decode.ctc import Hypothesis
from apps.speech.decode.greedy import GreedyStream
from apps.speech.decode.hotwords import Hotwords
from apps.speech.decode.lexicon import UNPRUNED, WordDecoder, WordStream
from apps.speech.decode.lm import LINE_LIMIT, MARKERS, LanguageModel, check_arpa
from apps.speech.decode.words import Word, timed_words
from apps.speech.device.spelling import Symbols
from kdcore.config import UserError

# where hot words, a grammar or a language model are asked for and no beam
BEAM = 16
# of the weight of a language model and of the score of a word, either way; -1 to 4 are usual
MOST = 50.0


@dataclass(frozen=True)
class Decoding:
    """How log-posteriors become words.

    Options:
        beam: prefixes kept; 1 is the best path, and ``BEAM`` where hot words, a grammar or a model are given.
        hot_words: phrase -> boost, natural log (``decode.hotwords``).
        grammar: the only words there are, in any sequence.
        lm: an ARPA file; its words, or those of ``grammar``, are the only ones there are.
        lm_weight, word_score: as in ``decode.lexicon.WordDecoder``, -50 to 50.
    Texts are normalised (``apps.speech.text``) as those of training.

    Raises:
        UserError: a beam below 1, a weight or score out of range.
    """

    beam: int = 1
    hot_words: Mapping[str, float] = field(default_factory=dict)
    grammar: tuple[str, ...] = ()
    lm: Path | None = None
    lm_weight: float = 1.0
    word_score: float = 0.0

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise UserError(f"beam: got {self.beam}, wanted 1 or more")
        for name, value in (("lm_weight", self.lm_weight), ("word_score", self.word_score)):
            if not abs(value) <= MOST:  # NaN too
                raise UserError(f"{name}: got {value:g}, wanted {-MOST:g} to {MOST:g}")

    @property
    def greedy(self) -> bool:
        """Whether the best path is all that is asked for."""
        return self.beam == 1 and not (self.hot_words or self.grammar or self.lm)

    @property
    def width(self) -> int:
        """The beam that is searched."""
        return self.beam if self.beam > 1 or self.greedy else BEAM


class Search(Protocol):
    """The search for the words of one segment; frames and times count from its start."""

    def accept(self, log_probs: np.ndarray) -> None:
        """Take more frames [T, C]."""

    def partial(self) -> str:
        """Return the text so far."""

    def words(self, *, ended: bool) -> list[Word]:
        """Return the words so far; with ``ended`` those of the whole, if the segment ends here."""


class Decoder:
    """Makes searches; what is wrong with the settings is said when it is made.

    ``left_out`` are the words of a language model that the symbols cannot spell.

    Raises:
        UserError: hot words, grammar or language model as in ``decode``; it names the phrase, word, file or line.
    """

    def __init__(self, symbols: Symbols, decoding: Decoding, calibration: Calibration | None = None) -> None:
        self._symbols, self._decoding, self._calibration = symbols, decoding, calibration
        self.left_out: tuple[str, ...] = ()
        self._hotwords: Hotwords | None = None
        for text in decoding.hot_words:
            if not symbols.normalise(text):
                raise UserError(f"hot words: got {text!r}, wanted a phrase of one or more words")
        if decoding.hot_words:
            self._hotwords = Hotwords(
                symbols, {symbols.normalise(text): boost for text, boost in decoding.hot_words.items()}
            )
        self._words = self._word_decoder() if decoding.grammar or decoding.lm else None

    def _word_decoder(self) -> WordDecoder:
        decoding = self._decoding
        words = [word for text in decoding.grammar for word in self._symbols.normalise(text).split()]
        if decoding.grammar and not words:
            raise UserError("grammar: got no words, wanted at least one")
        model = None
        if decoding.lm:
            if not words:
                known = read_vocabulary(decoding.lm)
                words = [word for word in known if self._symbols.can_spell(word)]
                self.left_out = tuple(word for word in known if not self._symbols.can_spell(word))
                if not words:
                    check_arpa(decoding.lm)  # what is no ARPA file holds no word either, and is told as such
                    raise UserError(f"{decoding.lm}: holds no word that the model's symbols can spell")
            words = list(dict.fromkeys(words))
            model = LanguageModel(decoding.lm, words)
        return WordDecoder(
            self._symbols,
            words,
            model,
            lm_weight=decoding.lm_weight,
            word_score=decoding.word_score,
            hotwords=self._hotwords,
            beam=decoding.width,
            **(UNPRUNED if decoding.grammar else {}),
        )

    def search(self) -> Search:
        """Return the search of a new segment."""
        if self._words is not None:
            return _WordSearch(self._words.stream(), self._timed)
        if self._decoding.greedy:
            return _Greedy(self._symbols, self._timed)
        classes = len(self._symbols.symbols) + 1
        return _Beam(PrefixSearch(classes, self._hotwords, beam=self._decoding.width), self._symbols, self._timed)

    def _timed(self, hypothesis: Hypothesis, words: tuple[str, ...] | None) -> list[Word]:
        return timed_words(hypothesis, self._symbols.symbols, words=words, calibration=self._calibration)


_Timed = Callable[[Hypothesis, "tuple[str, ...] | None"], list[Word]]


class _Greedy:
    def __init__(self, symbols: Symbols, timed: _Timed) -> None:
        self._symbols, self._timed, self._stream = symbols, timed, GreedyStream()
        self._ids: list[int] = []
        self._frames: list[int] = []
        self._probabilities: list[float] = []

    def accept(self, log_probs: np.ndarray) -> None:
        new = self._stream.accept(log_probs)
        self._ids += new.ids
        self._frames += new.frames
        self._probabilities += new.probabilities

    def partial(self) -> str:
        return self._symbols.decode(self._ids)

    def words(self, *, ended: bool) -> list[Word]:
        best = Hypothesis(tuple(self._ids), 0.0, tuple(self._frames), tuple(self._probabilities))
        return self._timed(best, None)


class _Beam:
    def __init__(self, search: PrefixSearch, symbols: Symbols, timed: _Timed) -> None:
        self._search, self._symbols, self._timed = search, symbols, timed

    def accept(self, log_probs: np.ndarray) -> None:
        self._search.accept(log_probs)

    def partial(self) -> str:
        return self._symbols.decode(self._search.partial().hypothesis.ids)

    def words(self, *, ended: bool) -> list[Word]:
        best = self._search.candidates()[0] if ended else self._search.partial()
        return self._timed(best.hypothesis, None)


class _WordSearch:
    def __init__(self, stream: WordStream, timed: _Timed) -> None:
        self._stream, self._timed = stream, timed

    def accept(self, log_probs: np.ndarray) -> None:
        self._stream.accept(log_probs)

    def partial(self) -> str:
        return " ".join(self._stream.partial().words)

    def words(self, *, ended: bool) -> list[Word]:
        best = self._stream.finish()[0] if ended else self._stream.partial()
        return self._timed(best.symbols, best.words)


def read_vocabulary(path: Path) -> list[str]:
    """Return the words of an ARPA file, without the markers of sentence ends and of the unknown word.

    Only the 1-grams are read, and not checked: ``LanguageModel`` does that.

    Raises:
        UserError: a file that cannot be read, or as in ``check_arpa`` if it is no UTF-8 text.
    """
    words: dict[str, None] = {}
    try:
        with open(path, "rb") as handle:
            inside = False
            while line := handle.readline(LINE_LIMIT):
                text = line.decode("utf-8").strip()
                if text == "\\1-grams:":
                    inside = True
                elif inside and text.startswith("\\") and len(text.split()) == 1:
                    break
                elif inside and len(fields := text.split()) >= 2:
                    words[fields[1]] = None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        check_arpa(path)  # names the line, or says what else it is: compressed, a binary
        raise UserError(f"{path}: not UTF-8 text, wanted an ARPA file") from None
    return [word for word in words if word not in MARKERS]


def read_grammar(path: Path, symbols: Symbols) -> tuple[str, ...]:
    """Return the words of a file, one or more a line; ``#`` begins a comment.

    Raises:
        UserError: a file that cannot be read, is no UTF-8 text or holds no word, or with its line a word that the
            symbols cannot spell.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; wanted words, one a line") from None
    words: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        for word in symbols.normalise(line.partition("#")[0]).split():
            try:
                symbols.encode(word)
            except UserError as error:
                raise UserError(f"{path}, line {number}: {word!r} cannot be spelled: {error}") from None
            words[word] = None
    if not words:
        raise UserError(f"{path}: holds no word; wanted words, one a line")
    return tuple(words)
