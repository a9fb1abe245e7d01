"""Reference and hypothesis word by word: which words are right, replaced, left out or put in. By jiwer; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len

_GAP = "*"


@dataclass(frozen=True)
class Alignment:
    """The cheapest way from a reference to a hypothesis, each edit of a word costing 1 (Levenshtein, 1966).

    ``pairs`` are positions (in the reference, in the hypothesis) from left to right; None where one has no word.
    """

    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]
    pairs: tuple[tuple[int | None, int | None], ...]

    @property
    def hits(self) -> list[tuple[int, int]]:
        """Positions in reference and hypothesis of the words that are right."""
        both = [(i, j) for i, j in self.pairs if i is not None and j is not None]
        return [(i, j) for i, j in both if self.reference[i] == self.hypothesis[j]]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Substitutions, deletions and insertions; their sum is the distance."""
        deletions = sum(j is None for _, j in self.pairs)
        insertions = sum(i is None for i, _ in self.pairs)
        return len(self.pairs) - deletions - insertions - len(self.hits), deletions, insertions

    def show(self, width: int = 100) -> str:
        """Return three lines (REF, HYP and the errors as S, D and I below), in blocks of at most ``width`` columns.

        A word longer than a block has a block of its own.
        """
        blocks: list[list[tuple[str, str, str]]] = [[]]
        used = room = max(width - 5, 1)
        for column in self._columns():
            size = cell_len(column[0]) + 1
            if used + size > room + 1 and blocks[-1]:
                blocks.append([])
            used = size if not blocks[-1] else used + size
            blocks[-1].append(column)
        return "\n\n".join(
            "\n".join(
                f"{name} {' '.join(column[row] for column in block)}".rstrip()
                for row, name in enumerate(("REF:", "HYP:", "    "))
            ).rstrip()
            for block in blocks
        )

    def _columns(self) -> Iterator[tuple[str, str, str]]:
        for i, j in self.pairs:
            first = None if i is None else self.reference[i]
            second = None if j is None else self.hypothesis[j]
            size = max(cell_len(first or ""), cell_len(second or ""))
            mark = "D" if second is None else "I" if first is None else " " if first == second else "S"
            yield _padded(first, size), _padded(second, size), _padded(mark, size)


def _padded(word: str | None, size: int) -> str:
    return _GAP * size if word is None else word + " " * (size - cell_len(word))


def align(references: Sequence[str], hypotheses: Sequence[str]) -> list[Alignment]:
    """Return the alignment of each hypothesis with its reference; both may be empty.

    Raises: ValueError if there are not as many of the one as of the other.
    """
    import jiwer

    _check_lengths(references, hypotheses)
    if not references:
        return []
    # jiwer takes a space for what parts words and leaves other white space in them
    output = jiwer.process_words([_spaced(text) for text in references], [_spaced(text) for text in hypotheses])
    return [
        Alignment(tuple(reference), tuple(hypothesis), tuple(_pairs(chunks)))
        for reference, hypothesis, chunks in zip(output.references, output.hypotheses, output.alignments, strict=True)
    ]


def count_characters(references: Sequence[str], hypotheses: Sequence[str]) -> list[tuple[int, int]]:
    """Return (errors, characters of the reference) for each pair of texts; the spaces between words count.

    Raises: ValueError if there are not as many of the one as of the other.
    """
    import jiwer

    _check_lengths(references, hypotheses)
    if not references:
        return []
    output = jiwer.process_characters([_spaced(text) for text in references], [_spaced(text) for text in hypotheses])
    counted = []
    for reference, chunks in zip(output.references, output.alignments, strict=True):
        hits = sum(i is not None and j is not None for i, j in _pairs([c for c in chunks if c.type == "equal"]))
        counted.append((sum(1 for _ in _pairs(chunks)) - hits, len(reference)))
    return counted


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _pairs(chunks: Sequence[Any]) -> Iterator[tuple[int | None, int | None]]:
    for chunk in chunks:
        first = range(chunk.ref_start_idx, chunk.ref_end_idx)
        second = range(chunk.hyp_start_idx, chunk.hyp_end_idx)
        if chunk.type == "delete":
            yield from ((i, None) for i in first)
        elif chunk.type == "insert":
            yield from ((None, j) for j in second)
        else:
            yield from zip(first, second, strict=True)


def _check_lengths(references: Sequence[str], hypotheses: Sequence[str]) -> None:
    if len(references) != len(hypotheses):
        raise ValueError(f"hypotheses: got {len(hypotheses)}, wanted one for each of {len(references)} references")
