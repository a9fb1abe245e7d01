"""Hot words: phrases that are preferred where the audio allows them, in any beam search. No torch.

The phrases are one automaton (Aho & Corasick, 1975) over the symbols. A phrase's boost is added in equal parts as its
symbols match, and given back when it does not go on; only whole words count, so "no" is not heard in "november".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from apps.speech.decode.ctc import BOUNDARY, Spelling
from kdcore.config import UserError

_EDGE = -1  # between words, at the start and at the end
MAX_BOOST = 50.0


class _Node:
    """A state: the longest part of a phrase that the symbols so far end with."""

    __slots__ = ("children", "fail", "pending", "reward", "steps")

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.steps: dict[int, _Node] = {}
        self.fail: _Node = self
        self.reward = 0.0  # of the phrases that are complete here
        self.pending = 0.0  # what the most rewarding phrase that may still go on has been given


class Hotwords:
    """Scores symbol prefixes by the phrases they hold; a ``beam.Scorer``.

    In all, a text gets the boost of every phrase in it, each time it occurs as whole words.

    Options:
        units: what spells the phrases.
        phrases: phrase -> boost, natural log, above 0 and at most 50; 2 to 8 are usual.

    Raises:
        UserError: no phrases, an empty one, one that cannot be spelled, or a boost out of range.
    """

    def __init__(self, units: Spelling, phrases: Mapping[str, float]) -> None:
        if not phrases:
            raise UserError("hot words: got no phrases, wanted at least one")
        symbols = units.symbols
        pieces = any(symbol.startswith(BOUNDARY) and symbol != BOUNDARY for symbol in symbols)
        self._keys = [_keys(index, symbol, pieces) for index, symbol in enumerate(symbols)]
        self._root = _Node()
        for phrase, boost in phrases.items():
            if not 0 < boost <= MAX_BOOST:
                raise UserError(f"hot words: boost of {phrase!r}: got {boost}, wanted above 0, at most {MAX_BOOST:g}")
            self._insert([key for symbol in _spell(units, phrase) for key in self._keys[symbol]], float(boost))
        self._link()

    def _insert(self, keys: list[int], boost: float) -> None:
        keys = [*([] if keys[0] == _EDGE else [_EDGE]), *keys, _EDGE]
        node = self._root
        for place, key in enumerate(keys):
            node = node.children.setdefault(key, _Node())
            if place < len(keys) - 1:
                node.pending = max(node.pending, boost * place / (len(keys) - 2))
        node.reward += boost

    def _link(self) -> None:
        """Link each state to the longest other one that it ends with; from the root on, so that theirs are known."""
        queue = deque([self._root])
        while queue:
            node = queue.popleft()
            for key, child in node.children.items():
                child.fail = self._root if node is self._root else self._step(node.fail, key)
                child.reward += child.fail.reward
                child.pending = max(child.pending, child.fail.pending)
                queue.append(child)

    def _step(self, node: _Node, key: int) -> _Node:
        known = node.steps.get(key)
        if known is None:
            known = node.children.get(key)
            if known is None:
                known = self._root if node is self._root else self._step(node.fail, key)
            node.steps[key] = known
        return known

    def start(self) -> _Node:
        """Return the state at the start, where a word may begin."""
        return self._step(self._root, _EDGE)

    def allowed(self, state: _Node) -> None:
        """Return None: any symbol may follow."""

    def key(self, state: _Node) -> _Node:
        """Return the state: what follows depends on all of it."""
        return state

    def advance(self, state: _Node, symbol: int) -> tuple[_Node, float]:
        """Return the state after ``symbol`` and the boost that it adds or, below 0, gives back."""
        total = 0.0
        for key in self._keys[symbol]:
            after = self._step(state, key)
            total += after.reward + after.pending - state.pending
            state = after
        return state, total

    def finish(self, state: _Node) -> float:
        """Return the boost of phrases that end with the audio, less that of phrases cut by it."""
        return self._step(state, _EDGE).reward - state.pending


def _keys(index: int, symbol: str, pieces: bool) -> tuple[int, ...]:
    if not symbol.startswith(BOUNDARY):
        return (index,)
    return (_EDGE, index) if pieces else (_EDGE,)


def _spell(units: Spelling, phrase: str) -> list[int]:
    if not isinstance(phrase, str) or not phrase.strip():
        raise UserError(f"hot words: got {phrase!r}, wanted a phrase of one or more words")
    try:
        spelling = units.encode(phrase)
    except UserError as error:
        raise UserError(f"hot words: {phrase!r} cannot be spelled: {error}") from None
    if not spelling:
        raise UserError(f"hot words: {phrase!r} cannot be spelled: the units leave nothing of it")
    return spelling
