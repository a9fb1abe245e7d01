"""CTC prefix beam search (Graves & Jaitly, 2014; Hannun et al., 2014), offline and in packets. No torch.

One search serves all decoders: a scorer says which symbol may follow a prefix and what score that adds. So a lexicon, a
language model, a grammar and hot words are scorers, and every path that collapses to a prefix counts for it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from apps.speech.decode.ctc import Hypothesis, check_log_probs

# below any probability that matters, and enough to keep a prefix alive where a posterior is 0
FLOOR = 1e-30
# every so many frames what all prefixes agree on is settled; 2 s
SETTLE_EVERY = 50
# of a score that one symbol adds, natural log: more than any posterior takes away, and its exponential is a number
MOST_GAIN = 600.0


class Scorer(Protocol):
    """Scores prefixes as they grow; a state is opaque to the search and never changed in place."""

    def start(self) -> Any:
        """Return the state of the empty prefix."""

    def advance(self, state: Any, symbol: int) -> tuple[Any, float] | None:
        """Return the state after ``symbol`` and the natural-log score it adds; None if it may not follow."""

    def finish(self, state: Any) -> float | None:
        """Return the score that the end of the audio adds; None if the prefix is not complete."""

    def allowed(self, state: Any) -> Collection[int] | None:
        """Return the only symbols that may follow, which saves asking for all others; None if any may."""

    def key(self, state: Any) -> Hashable:
        """Return what all further scores depend on: two states with the same key have the same future."""


class Scorers:
    """Several scorers as one: a symbol must be allowed by all of them, and their scores add up."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self._scorers = tuple(scorers)

    def start(self) -> tuple[Any, ...]:
        """Return the scorers' starts."""
        return tuple(scorer.start() for scorer in self._scorers)

    def advance(self, state: tuple[Any, ...], symbol: int) -> tuple[tuple[Any, ...], float] | None:
        """Return the scorers' states after ``symbol`` and the sum of their scores; None if one forbids it."""
        states, total = [], 0.0
        for scorer, part in zip(self._scorers, state, strict=True):
            step = scorer.advance(part, symbol)
            if step is None:
                return None
            states.append(step[0])
            total += step[1]
        return tuple(states), total

    def finish(self, state: tuple[Any, ...]) -> float | None:
        """Return the sum of the scorers' last scores; None if one is not complete."""
        total = 0.0
        for scorer, part in zip(self._scorers, state, strict=True):
            score = scorer.finish(part)
            if score is None:
                return None
            total += score
        return total

    def allowed(self, state: tuple[Any, ...]) -> Collection[int] | None:
        """Return what the strictest scorer allows."""
        found = (scorer.allowed(part) for scorer, part in zip(self._scorers, state, strict=True))
        return min((symbols for symbols in found if symbols is not None), key=len, default=None)

    def key(self, state: tuple[Any, ...]) -> Hashable:
        """Return the scorers' keys."""
        return tuple(scorer.key(part) for scorer, part in zip(self._scorers, state, strict=True))


@dataclass(frozen=True)
class Candidate:
    """A prefix at the end of the audio: hypothesis, scorer's state, and whether the scorer calls it complete."""

    hypothesis: Hypothesis
    state: Any
    complete: bool


class _Prefix:
    """A node of the prefix tree.

    ``blank`` and ``mass`` are the probabilities of the paths that end in a blank and in the symbol, relative to the
    best prefix. ``emitted`` is a chain of [frame, probability, chain before]; a child keeps the one it was born with.
    """

    __slots__ = (
        "alive",
        "allowed",
        "blank",
        "children",
        "depth",
        "emitted",
        "factor",
        "key",
        "mass",
        "next_blank",
        "next_emitted",
        "next_mass",
        "parent",
        "stamp",
        "state",
        "symbol",
    )

    def __init__(
        self, symbol: int, parent: _Prefix | None, state: Any, factor: float, allowed: Collection[int] | None
    ) -> None:
        self.symbol, self.parent, self.state, self.factor, self.allowed = symbol, parent, state, factor, allowed
        self.depth: int = parent.depth + 1 if parent else 0
        self.children: dict[int, _Prefix | None] = {}
        self.blank = self.mass = self.next_blank = self.next_mass = 0.0
        self.emitted: list[Any] | None = None
        self.next_emitted: list[Any] | None = None
        self.stamp, self.alive = -1, False
        self.key: Hashable = None


class PrefixSearch:
    """Prefix beam search over frames that come in packets; the result does not depend on how they are split.

    Memory is bounded by the beam and ``unsettled``, apart from the settled symbols themselves.

    Options:
        classes: C, the symbols and the blank.
        beam: prefixes kept after each frame.
        tokens: symbols tried in each frame, the most probable ones.
        floor: the least posterior of a symbol that is tried; 0 tries all.
        threshold: prefixes further than this below the best one are dropped, natural log.
        recombine: whether prefixes with the same last symbol and the same future are one from there on, the likeliest,
            with the paths of all. A beam then reaches much further; alternatives long past are missing in the N best.
        unsettled: symbols about which prefixes may differ; beyond that, those that differ from the best are dropped.

    Raises:
        ValueError: an option that is out of range.
    """

    def __init__(
        self,
        classes: int,
        scorer: Scorer | None = None,
        *,
        beam: int = 16,
        tokens: int = 30,
        floor: float = 1e-5,
        threshold: float = 30.0,
        recombine: bool = False,
        unsettled: int = 200,
    ) -> None:
        for name, value, least in (("classes", classes, 2), ("beam", beam, 1), ("tokens", tokens, 1)):
            if value < least:
                raise ValueError(f"{name}: got {value}, wanted {least} or more")
        if not 0 <= floor < 1 or not threshold > 0 or unsettled < 1:
            raise ValueError(
                f"floor, threshold, unsettled: got {floor}, {threshold}, {unsettled}, "
                "wanted 0 <= floor < 1, threshold > 0, unsettled >= 1"
            )
        self._classes, self._scorer, self._beam_size = classes, scorer, beam
        self._tokens, self._floor, self._unsettled = min(tokens, classes - 1), floor, unsettled
        self._ratio = math.exp(-min(threshold, 600.0))
        self._recombine = recombine and scorer is not None
        self._frame = 0
        self._log_scale = 0.0
        self._settled: list[tuple[int, int, float]] = []
        state = scorer.start() if scorer else None
        self._root = _Prefix(-1, None, state, 1.0, scorer.allowed(state) if scorer else None)
        self._root.blank, self._root.alive = 1.0, True
        self._beam = [self._root]

    @property
    def frames(self) -> int:
        """The frames taken so far."""
        return self._frame

    def accept(self, log_probs: np.ndarray) -> None:
        """Take more frames.

        Raises:
            ValueError: as ``check_log_probs``.
        """
        values = check_log_probs(log_probs, self._classes)
        if not len(values):
            return
        rows = np.maximum(np.exp(values), FLOOR)
        symbols = rows[:, :-1]
        if self._tokens < self._classes - 1:
            chosen = np.argpartition(-symbols, self._tokens - 1, axis=1)[:, : self._tokens]
            chosen.sort(axis=1)
        else:
            chosen = np.broadcast_to(np.arange(self._classes - 1), symbols.shape)
        likely = np.take_along_axis(symbols, chosen, axis=1) >= self._floor
        for row, tokens, mask in zip(rows.tolist(), chosen, likely, strict=True):
            self._step(row, tokens[mask].tolist())
            self._frame += 1
            if self._frame % SETTLE_EVERY == 0:
                self._settle()

    def _step(self, row: list[float], tokens: list[int]) -> None:
        stamp, blank = self._frame, row[-1]
        touched = self._beam
        for node in touched:  # first what stays, so that what is added can be compared with it
            node.next_blank = (node.blank + node.mass) * blank
            node.next_mass = node.mass * row[node.symbol]
            node.next_emitted, node.stamp = node.emitted, stamp
        if tokens:
            touched = touched + self._extend(row, tokens, stamp)
        if self._recombine:
            touched = _recombined(touched)
        best = max(node.next_blank + node.next_mass for node in touched)
        least = best * self._ratio
        kept = [node for node in touched if node.next_blank + node.next_mass >= least]
        if len(kept) > self._beam_size:
            kept.sort(key=lambda node: node.next_blank + node.next_mass, reverse=True)
            del kept[self._beam_size :]
        before, self._beam = self._beam, kept
        for node in before:
            node.alive = False
        for node in kept:
            node.blank, node.mass, node.emitted = node.next_blank / best, node.next_mass / best, node.next_emitted
            node.alive = True
        for node in touched:
            node.next_emitted = None
        for node in before:
            if not node.alive:
                _release(node)
        self._log_scale += math.log(best)

    def _extend(self, row: list[float], tokens: list[int], stamp: int) -> list[_Prefix]:
        """Add the paths that emit a symbol now; return the prefixes that were not in the beam."""
        added, tried = list[_Prefix](), frozenset(tokens)
        # what cannot survive is not looked at further
        least = self._ratio * max(node.next_blank + node.next_mass for node in self._beam)
        for node in self._beam:
            after_blank, last, children, allowed = node.blank, node.symbol, node.children, node.allowed
            total = after_blank + node.mass
            for symbol in tokens if allowed is None else _common(tokens, tried, allowed):
                gain = (after_blank if symbol == last else total) * row[symbol]
                child = children.get(symbol, node)
                if child is node:  # not asked for yet
                    if gain == 0.0:
                        continue
                    child = children[symbol] = self._grow(node, symbol)
                if child is None:
                    continue
                gain *= child.factor
                if gain < least or gain == 0.0:
                    continue
                if child.stamp != stamp:
                    child.stamp, child.next_blank, child.next_mass = stamp, 0.0, 0.0
                    added.append(child)
                if gain > child.next_blank + child.next_mass:
                    child.next_emitted = [stamp, row[symbol], node.emitted]
                child.next_mass += gain
        return added

    def _grow(self, node: _Prefix, symbol: int) -> _Prefix | None:
        if self._scorer is None:
            return _Prefix(symbol, node, None, 1.0, None)
        step = self._scorer.advance(node.state, symbol)
        if step is None:
            return None
        factor = math.exp(min(step[1], MOST_GAIN))
        child = _Prefix(symbol, node, step[0], factor, self._scorer.allowed(step[0]))
        if self._recombine:
            child.key = (symbol, self._scorer.key(child.state))
        return child

    def _settle(self) -> None:
        """Move the root to where the prefixes part, and forget what lies before it."""
        deepest = max(node.depth for node in self._beam)
        if deepest - self._root.depth > self._unsettled:
            self._agree(deepest - self._unsettled)
        root = self._root
        path = _chain(self._best())
        while not root.alive:
            living = [child for child in root.children.values() if child is not None]
            if len(living) != 1:
                break
            child = living[0]
            frame, probability = path[child.depth - self._root.depth - 1]
            self._settled.append((child.symbol, frame, probability))
            child.parent = None
            root = child
        self._root = root
        for node in self._beam:  # a chain is as long as its prefix is deep
            link = node.emitted
            for _ in range(node.depth - root.depth - 1):
                link = link[2] if link else None
            if link and node is not root:
                link[2] = None
        if root.alive:
            root.emitted = None

    def _agree(self, depth: int) -> None:
        """Drop the prefixes that differ from the best one in its first ``depth`` symbols."""
        best = self._best()
        depth = min(depth, best.depth)
        wanted = _ancestor(best, depth)
        kept = [node for node in self._beam if node.depth >= depth and _ancestor(node, depth) is wanted]
        for node in self._beam:
            node.alive = False
        for node in kept:
            node.alive = True
        for node in self._beam:
            if not node.alive:
                _release(node)
        self._beam = kept

    def _best(self) -> _Prefix:
        return max(self._beam, key=lambda node: node.blank + node.mass)

    def partial(self) -> Candidate:
        """Return the best prefix so far; what the end of the audio adds is not in its score."""
        node = self._best()
        return Candidate(self._hypothesis(node, 0.0), node.state, False)

    def candidates(self) -> list[Candidate]:
        """Return the prefixes in the beam as if the audio ended here, complete ones first, then by score."""
        found = []
        for node in self._beam:
            extra = self._scorer.finish(node.state) if self._scorer else 0.0
            found.append(Candidate(self._hypothesis(node, extra or 0.0), node.state, extra is not None))
        return sorted(found, key=lambda candidate: (candidate.complete, candidate.hypothesis.score), reverse=True)

    def _hypothesis(self, node: _Prefix, extra: float) -> Hypothesis:
        ids, step = [], node
        while step is not self._root and step.parent is not None:
            ids.append(step.symbol)
            step = step.parent
        chain = _chain(node)
        return Hypothesis(
            tuple(symbol for symbol, _, _ in self._settled) + tuple(reversed(ids)),
            math.log(node.blank + node.mass) + self._log_scale + extra,
            tuple(frame for _, frame, _ in self._settled) + tuple(frame for frame, _ in chain),
            tuple(part for _, _, part in self._settled) + tuple(part for _, part in chain),
        )


def _recombined(nodes: list[_Prefix]) -> list[_Prefix]:
    """Return the likeliest prefix of each key, given the paths of the others."""
    found: dict[Hashable, _Prefix] = {}
    for node in nodes:
        other = found.setdefault(node.key, node)
        if other is node:
            continue
        if other.next_blank + other.next_mass < node.next_blank + node.next_mass:
            found[node.key], node, other = node, other, node
        other.next_blank += node.next_blank
        other.next_mass += node.next_mass
    return list(found.values())


def _common(tokens: Sequence[int], tried: Collection[int], allowed: Collection[int]) -> list[int]:
    """Return the tokens, which are ``tried`` too, that are allowed, in their order; the work is that of the fewer."""
    if len(allowed) < len(tokens):
        return sorted(symbol for symbol in allowed if symbol in tried)
    return [symbol for symbol in tokens if symbol in allowed]


def _chain(node: _Prefix) -> list[tuple[int, float]]:
    """Return frame and probability of the symbols of a prefix that are not settled, the first one first."""
    links, link = [], node.emitted
    while link:
        links.append((link[0], link[1]))
        link = link[2]
    return links[::-1]


def _ancestor(node: _Prefix, depth: int) -> _Prefix:
    while node.depth > depth and node.parent is not None:
        node = node.parent
    return node


def _release(node: _Prefix) -> None:
    """Free what a prefix that left the beam holds: dead children, and itself and its parents if no prefix needs them.

    Dead children of a living prefix stay, so that the scorer is not asked again.
    """
    node.emitted = None
    for symbol, child in list(node.children.items()):
        if child is None or not (child.alive or child.children):
            del node.children[symbol]
    while not node.alive and not node.children and node.parent is not None and not node.parent.alive:
        parent = node.parent
        if parent.children.get(node.symbol) is node:
            del parent.children[node.symbol]
        node = parent
