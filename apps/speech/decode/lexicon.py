"""Words decoded with a lexicon, with or without a language model: a closed word list, any sequence of them. No torch.

Words are spelled by the units: characters with the boundary ``▁`` between words, or pieces that carry it in front. The
lexicon is a prefix tree that scores prefixes (``beam.Scorer``), so repeats of a word's last symbol and words that end
with the audio count as they should.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apps.speech.decode.beam import Candidate, PrefixSearch, Scorer, Scorers
from apps.speech.decode.ctc import BOUNDARY, Hypothesis, Spelling
from apps.speech.decode.hotwords import Hotwords
from apps.speech.decode.lm import LanguageModel
from kdcore.config import UserError

# for lists that leave few symbols to try: none is too unlikely, as a voice that the model hardly knows may need it
UNPRUNED: Mapping[str, Any] = {"tokens": 1_000_000, "floor": 0.0, "threshold": 600.0}


@dataclass(frozen=True)
class WordHypothesis:
    """A word sequence.

    Attributes:
        words: the words.
        score: their natural log score, all spellings in the beam together: posteriors, language model, boosts.
        symbols: the best spelling, with the frame of each symbol.
    """

    words: tuple[str, ...]
    score: float
    symbols: Hypothesis


class _Node:
    """A node of the lexicon; ``best``, the highest score of a word below, is what its symbols anticipate."""

    __slots__ = ("allowed", "best", "children", "word")

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.word, self.best = -1, 0.0
        self.allowed: frozenset[int] | None = None


class _History:
    """The words before, for the language model; what may follow is kept; ``context`` is what it looks at."""

    __slots__ = ("context", "following", "state")

    def __init__(self, state: Any, context: tuple[int, ...] = ()) -> None:
        self.state, self.context = state, context
        self.following: dict[int, tuple[_History, float]] = {}


State = tuple[_Node, _History, int]


class Lexicon:
    """Scores symbol prefixes by a word list and a language model; the scorer of ``WordDecoder``.

    Raises:
        UserError: no words, a word that the units cannot spell, or two words that are spelled alike.
    """

    def __init__(
        self,
        units: Spelling,
        words: Iterable[str],
        lm: LanguageModel | None,
        lm_weight: float,
        word_score: float,
        max_words: int | None,
    ) -> None:
        self.words = tuple(dict.fromkeys(words))
        if not self.words:
            raise UserError("lexicon: got no words, wanted at least one")
        self._lm, self._lm_weight, self._word_score, self._max_words = lm, lm_weight, word_score, max_words
        spellings = [_spell(units, word) for word in self.words]
        starts = {index for index, symbol in enumerate(units.symbols) if symbol.startswith(BOUNDARY)}
        self._pieces = any(spelling[0] in starts for spelling in spellings)
        self._boundary = units.symbols.index(BOUNDARY) if not self._pieces and BOUNDARY in units.symbols else -1
        self._root = _Node()
        for index, spelling in enumerate(spellings):
            if self._pieces and (spelling[0] not in starts or starts.intersection(spelling[1:])):
                raise UserError(
                    f"lexicon: word {self.words[index]!r} does not have {BOUNDARY} where it starts, and there only"
                )
            self._insert(index, spelling)
        self._permit(self._root)
        self._over = frozenset({self._boundary} if self._boundary >= 0 else ())
        self._alone = _History(None)

    def _insert(self, word: int, spelling: Sequence[int]) -> None:
        score = self._word_score + (self._lm_weight * self._lm.alone(word) if self._lm else 0.0)
        node = self._root
        for symbol in spelling:
            known = node.children.get(symbol)
            if known is None:
                known = node.children[symbol] = _Node()
                known.best = score
            node = known
            node.best = max(node.best, score)
        if node.word >= 0:
            raise UserError(f"lexicon: {self.words[word]!r} and {self.words[node.word]!r} are spelled alike")
        node.word = word

    def _permit(self, root: _Node) -> None:
        """Note what may follow each node; after a word of pieces that is any start of a word, which is left open."""
        nodes = [root]
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            if node.word < 0 and (node is not root or self._boundary < 0):
                node.allowed = frozenset(node.children)
            elif self._boundary >= 0:
                node.allowed = frozenset((*node.children, self._boundary))

    def start(self) -> State:
        """Return the state before any word."""
        return self._root, _History(self._lm.start()) if self._lm else self._alone, 0

    def allowed(self, state: State) -> Collection[int] | None:
        """Return the symbols that may follow; None for the end of a word of pieces."""
        node, _, count = state
        return self._over if node is self._root and count == self._max_words else node.allowed

    def key(self, state: State) -> tuple[_Node, tuple[int, ...], int]:
        """Return where in which word, the words that the model looks at, and their number if that is limited."""
        node, history, count = state
        return node, history.context, count if self._max_words else 0

    def advance(self, state: State, symbol: int) -> tuple[State, float] | None:
        """Return the state after ``symbol`` and what it adds: the anticipated score of a word, or the word's own."""
        node, history, count = state
        full = count == self._max_words
        child = node.children.get(symbol)
        if child is not None:
            before = node.best if node is not self._root else 0.0
            return None if full and node is self._root else ((child, history, count), child.best - before)
        if symbol == self._boundary and node is self._root:
            return state, 0.0
        first = self._root.children.get(symbol) if self._pieces else None
        if node.word < 0 or (symbol != self._boundary and first is None):
            return None
        after, score = self._follow(history, node.word)
        if first is None:
            return (self._root, after, count + 1), score - node.best
        if count + 1 == self._max_words:
            return None
        return (first, after, count + 1), score - node.best + first.best

    def finish(self, state: State) -> float | None:
        """Return what the end adds: the last word's own score and the language model's end; None within a word."""
        node, history, _ = state
        if node is self._root:
            return self._end(history)
        if node.word < 0:
            return None
        after, score = self._follow(history, node.word)
        return score - node.best + self._end(after)

    def _end(self, history: _History) -> float:
        return self._lm_weight * self._lm.finish(history.state) if self._lm else 0.0

    def _follow(self, history: _History, word: int) -> tuple[_History, float]:
        if self._lm is None:
            return self._alone, self._word_score
        known = history.following.get(word)
        if known is None:
            state, score = self._lm.score(history.state, word)
            context = (*history.context, word)[1 - self._lm.order :]
            known = history.following[word] = (_History(state, context), self._word_score + self._lm_weight * score)
        return known

    def read(self, ids: Sequence[int]) -> tuple[tuple[str, ...], int]:
        """Return the words that ``ids`` spell, and how many symbols they take; a last word not complete is left out."""
        words: list[str] = []
        node, taken = self._root, 0
        for place, symbol in enumerate(ids):
            child = node.children.get(symbol)
            if child is None:  # a boundary, or the start of the next word of pieces
                if node is not self._root:
                    words.append(self.words[node.word])
                taken = place
                node = self._root.children[symbol] if self._pieces else self._root
            else:
                node = child
        if node is not self._root and node.word >= 0:
            words.append(self.words[node.word])
            taken = len(ids)
        return tuple(words), taken


def _spell(units: Spelling, word: str) -> list[int]:
    if len(word.split()) != 1 or word.strip() != word:
        raise UserError(f"lexicon: got {word!r}, wanted one word without spaces")
    try:
        spelling = units.encode(word)
    except UserError as error:
        raise UserError(f"lexicon: word {word!r} cannot be spelled: {error}") from None
    if not spelling:
        raise UserError(f"lexicon: word {word!r} cannot be spelled: the units leave nothing of it")
    return spelling


class WordDecoder:
    """Decodes posteriors into words of a list.

    The score of words W is log P(W's spellings | x) + lm_weight * log P(W) + word_score * |W| + boosts, natural logs;
    tools that weigh log10 probabilities, as flashlight-text does, need a weight 2.3 times as high for the same.

    Options:
        units: what spells the words.
        words: the word list; repeats are dropped.
        lm: path of an ARPA file, or a ``LanguageModel`` made with the same words in the same order; None for none.
        hotwords: phrases with boosts, on top.
        max_words: the most words in an utterance; None for any number.
        recombine: as in ``PrefixSearch``; without it a beam of the same reach is several times as wide, and the N best
            hold every alternative.
        beam, tokens, floor, threshold: as in ``PrefixSearch``.

    Raises:
        UserError: words as in ``Lexicon``, an LM file that is missing or malformed.
    """

    def __init__(
        self,
        units: Spelling,
        words: Iterable[str],
        lm: str | LanguageModel | None = None,
        *,
        lm_weight: float = 1.0,
        word_score: float = 0.0,
        hotwords: Hotwords | None = None,
        max_words: int | None = None,
        recombine: bool = True,
        beam: int = 32,
        tokens: int = 20,
        floor: float = 1e-4,
        threshold: float = 14.0,
    ) -> None:
        words = tuple(dict.fromkeys(words))
        if max_words is not None and max_words < 1:
            raise ValueError(f"max_words: got {max_words}, wanted 1 or more")
        model = LanguageModel(lm, words) if isinstance(lm, str) else lm
        self.lexicon = Lexicon(units, words, model, lm_weight, word_score, max_words)
        self._scorer: Scorer = Scorers([self.lexicon, hotwords]) if hotwords else self.lexicon
        self._classes = len(units.symbols) + 1
        self._options: dict[str, Any] = {
            "recombine": recombine,
            "beam": beam,
            "tokens": tokens,
            "floor": floor,
            "threshold": threshold,
        }
        self.stream()  # says now what is wrong with the options

    def decode(self, log_probs: np.ndarray, n: int = 1) -> list[WordHypothesis]:
        """Return the at most ``n`` best word sequences of ``log_probs`` [T, C], the best first."""
        stream = self.stream()
        stream.accept(log_probs)
        return stream.finish(n)

    def stream(self) -> WordStream:
        """Return a decoding of audio that comes in packets."""
        return WordStream(self.lexicon, PrefixSearch(self._classes, self._scorer, **self._options))


class Grammar(WordDecoder):
    """Decodes posteriors into a closed list of words, all equally likely, in any sequence of at most ``max_words``.

    Every symbol that the words allow is tried.
    """

    def __init__(self, units: Spelling, words: Iterable[str], *, max_words: int | None = None, beam: int = 128) -> None:
        super().__init__(units, words, max_words=max_words, beam=beam, **UNPRUNED)


class WordStream:
    """Words of audio that comes in packets; what they are does not depend on how the frames are split."""

    def __init__(self, lexicon: Lexicon, search: PrefixSearch) -> None:
        self._lexicon, self._search = lexicon, search

    def accept(self, log_probs: np.ndarray) -> None:
        """Take more frames; ValueError as ``check_log_probs``."""
        self._search.accept(log_probs)

    def partial(self) -> WordHypothesis:
        """Return the words of the best prefix so far, without a last one that is not complete."""
        return self._words(self._search.partial())

    def finish(self, n: int = 1) -> list[WordHypothesis]:
        """Return the at most ``n`` best word sequences if the audio ends here, the best first.

        Sequences that the end cuts within a word come last, without that word.
        """
        found: dict[tuple[bool, tuple[str, ...]], WordHypothesis] = {}
        for candidate in self._search.candidates():
            words = self._words(candidate)
            key = (candidate.complete, words.words)
            known = found.get(key)
            if known is None:
                found[key] = words
            else:  # the same words with more boundaries between them
                total = float(np.logaddexp(known.score, words.score))
                found[key] = WordHypothesis(known.words, total, known.symbols)
        best: dict[tuple[str, ...], WordHypothesis] = {}
        for (_, text), words in sorted(found.items(), key=lambda item: (item[0][0], item[1].score), reverse=True):
            best.setdefault(text, words)
        return list(best.values())[:n]

    def _words(self, candidate: Candidate) -> WordHypothesis:
        symbols = candidate.hypothesis
        words, taken = self._lexicon.read(symbols.ids)
        cut = Hypothesis(symbols.ids[:taken], symbols.score, symbols.frames[:taken], symbols.probabilities[:taken])
        return WordHypothesis(words, symbols.score, cut)
