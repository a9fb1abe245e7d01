"""n-gram language models built from text: interpolated modified Kneser-Ney, written as ARPA. No torch.

Kneser & Ney (1995), Chen & Goodman (1998); counts as KenLM's lmplz has them: a lower order counts the different words
before an n-gram, except where it starts a sentence. An order with too few counts for its three discounts (a small or
regular text) is smoothed as by Witten & Bell (1991) instead, on the same counts.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from apps.speech.decode.lm import END, MAX_ORDER, MIN_ORDER, START, UNKNOWN, marker_in
from kdcore.config import UserError
from kdcore.run import write_text

Gram = tuple[str, ...]


def build_ngram(texts: Iterable[str], order: int, *, vocabulary: Iterable[str] = ()) -> str:
    """Return a model of ``texts``, one sentence each, as the text of an ARPA file.

    Back-off and probabilities of every context sum to 1 over the words, </s> and <unk>. Empty texts are left out.

    Options:
        order: 2 to 6 words; what is longer than the longest sentence with its ends is left out.
        vocabulary: words that the model knows besides those of the texts; unseen ones share what <unk> has.

    Raises:
        UserError: no text, or one that holds <s>, </s> or <unk>.
        ValueError: another order.
    """
    if not MIN_ORDER <= order <= MAX_ORDER:
        raise ValueError(f"order: got {order}, wanted {MIN_ORDER} to {MAX_ORDER}")
    sentences = []
    for number, text in enumerate(texts, start=1):
        words = text.split()
        if (marker := marker_in(text)) is not None:
            raise UserError(f"text {number}: got {marker}, wanted words (a model has that symbol by itself)")
        if words:
            sentences.append((START, *words, END))
    if not sentences:
        raise UserError("no text to build a language model from, wanted at least one sentence with a word")
    order = min(order, max(map(len, sentences)))
    counts = _adjusted(sentences, order)
    known = {gram[0] for gram in counts[1]} | set(vocabulary) | {END, UNKNOWN}
    return _arpa(counts, sorted(known - {START}), order)


def _adjusted(sentences: list[Gram], order: int) -> dict[int, Counter[Gram]]:
    """Return the counts of each order: occurrences of the highest, different words before of the others."""
    counts: dict[int, Counter[Gram]] = {order: Counter()}
    for sentence in sentences:
        counts[order].update(sentence[place : place + order] for place in range(len(sentence) - order + 1))
    for length in range(order - 1, 0, -1):
        counts[length] = Counter(gram[1:] for gram in counts[length + 1])
        if length > 1:  # nothing comes before the start
            starts = Counter(sentence[:length] for sentence in sentences if len(sentence) >= length)
            counts[length].update(starts)
    counts[1].pop((START,), None)
    return counts


def _discounts(counts: Iterable[int]) -> tuple[float, float, float] | None:
    """Return what is taken from counts of 1, 2, and 3 or more (Chen & Goodman, 1998); None if they do not allow it."""
    of = Counter(counts)
    if not all(of[count] for count in (1, 2, 3, 4)):
        return None
    share = of[1] / (of[1] + 2 * of[2])
    found = tuple(count - (count + 1) * share * of[count + 1] / of[count] for count in (1, 2, 3))
    if any(not 0 < discount <= count for count, discount in zip((1, 2, 3), found, strict=True)):
        return None
    return found[0], found[1], found[2]


class _Order:
    """The probabilities of one order, given those of the order below."""

    def __init__(self, counts: Counter[Gram]) -> None:
        self._counts = counts
        self._discount = _discounts(counts.values())
        followers: defaultdict[Gram, list[int]] = defaultdict(list)
        for gram, count in counts.items():
            followers[gram[:-1]].append(count)
        self._total = {context: sum(found) for context, found in followers.items()}
        self.left = {context: self._left(found) for context, found in followers.items()}

    def _taken(self, count: int) -> float:
        return self._discount[min(count, 3) - 1] if self._discount else 0.0

    def _left(self, followers: list[int]) -> float:
        """Return the share of a context that its order below is given: its back-off weight."""
        total = sum(followers)
        if self._discount is None:
            return len(followers) / (total + len(followers))
        return sum(self._taken(count) for count in followers) / total

    def probability(self, gram: Gram, lower: float) -> float:
        """Return P(last word | the words before), interpolated with that of the order below."""
        context = gram[:-1]
        if context not in self.left:
            return lower
        left = self.left[context]
        total = self._total[context] / (1.0 if self._discount else 1.0 - left)
        count = self._counts.get(gram, 0)
        return (count - self._taken(count)) / total + left * lower if count else left * lower


def _arpa(counts: dict[int, Counter[Gram]], known: list[str], order: int) -> str:
    orders = {length: _Order(counts[length]) for length in counts}
    table: dict[Gram, float] = {(word,): orders[1].probability((word,), 1.0 / len(known)) for word in known}
    sections: list[list[str]] = []
    for length in range(1, order + 1):
        if length > 1:
            below = table
            table = {gram: orders[length].probability(gram, below[gram[1:]]) for gram in counts[length]}
        weights = orders[length + 1].left if length < order else {}
        lines = [_line(gram, math.log10(value), weights.get(gram)) for gram, value in sorted(table.items())]
        if length == 1:
            lines.append(_line((START,), -99.0, weights.get((START,))))
        sections.append(lines)
    header = ["\\data\\", *(f"ngram {length}={len(lines)}" for length, lines in enumerate(sections, start=1))]
    body = [[f"\\{length}-grams:", *lines, ""] for length, lines in enumerate(sections, start=1)]
    return "\n".join([*header, "", *(line for lines in body for line in lines), "\\end\\", ""])


def _line(gram: Gram, log10: float, weight: float | None) -> str:
    ending = "" if weight is None else f"\t{math.log10(weight):.7g}"
    return f"{min(log10, 0.0):.7g}\t{' '.join(gram)}{ending}"


def write_arpa(
    path: str | os.PathLike[str], texts: Iterable[str], order: int, *, vocabulary: Iterable[str] = ()
) -> None:
    """Write the model of ``texts`` to an ARPA file, atomically; options and errors as ``build_ngram``."""
    write_text(path, build_ngram(texts, order, vocabulary=vocabulary))


def read_sentences(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a text file, one sentence each.

    Raises:
        UserError: a file that cannot be read, is not UTF-8, or holds no word.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"{file}: no text, wanted one sentence a line")
    return lines
