"""How a text is spelled with the symbols of an exported folder, without the model that made them. No torch.

Characters spell themselves, and so do whole words. Pieces of byte-pair encoding stand in the order in which they were
merged, so that their list alone gives the spelling that SentencePiece gives, and on which the model was trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from apps.speech.decode.ctc import BOUNDARY
from apps.speech.text import TextRules
from kdcore.config import UserError


@dataclass(frozen=True)
class Symbols:
    """The symbols of a model by id, the blank behind them: a ``decode.ctc.Spelling``.

    Attributes:
        symbols: characters with ``▁`` between words, or pieces or whole words that carry it in front.
        rules: how texts are normalised, which is how those of training were.
    """

    symbols: tuple[str, ...]
    rules: TextRules = field(default_factory=TextRules)

    @cached_property
    def pieces(self) -> bool:
        """Whether the symbols are pieces, of which a word's first one carries the boundary."""
        return any(symbol.startswith(BOUNDARY) and symbol != BOUNDARY for symbol in self.symbols)

    @cached_property
    def whole_words(self) -> bool:
        """Whether every symbol is a word: pieces come with the characters that they were merged from."""
        return all(symbol.startswith(BOUNDARY) and symbol != BOUNDARY for symbol in self.symbols)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: index for index, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> list[int]:
        """Return the ids that spell a normalised text.

        Raises:
            UserError: the text holds what the symbols cannot spell; it names that.
        """
        words = text.split()
        if self.whole_words:
            names = [BOUNDARY + word for word in words]
        elif self.pieces:
            names = [name for word in words for name in self._merged(word)]
        else:
            names = list(BOUNDARY.join(words))
        for name in names:
            if name not in self._ids or (self.pieces and BOUNDARY in name[1:]):
                raise UserError(f"{(name.removeprefix(BOUNDARY) or name)!r} is not among the model's symbols")
        return [self._ids[name] for name in names]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, words separated by one space."""
        return " ".join("".join(self.symbols[index] for index in ids).replace(BOUNDARY, " ").split())

    def normalise(self, text: str) -> str:
        """Return a text of the user's as the model was trained to write it."""
        return self.rules.normalise(text)

    def can_spell(self, text: str) -> bool:
        """Return whether every part of a text has a symbol."""
        try:
            self.encode(text)
        except UserError:
            return False
        return True

    def _merged(self, word: str) -> list[str]:
        """Return the pieces of a word: of all pairs that are a piece, the one learned first is merged, again and again.

        Reference: Sennrich et al., 2016.
        """
        parts = list(BOUNDARY + word)
        while True:
            ranks = [self._ids.get(first + second) for first, second in pairwise(parts)]
            known = [(rank, place) for place, rank in enumerate(ranks) if rank is not None]
            if not known:
                return parts
            _, place = min(known)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
