"""What is done to a transcript before it is compared or encoded. No torch."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

BOUNDARY = "▁"
# what keyboards and books write for an apostrophe
_APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼ＇`´"), "'")


@dataclass(frozen=True)
class TextRules:
    """How transcripts are normalised.

    In this order: Unicode NFKC (full-width letters, ligatures and superscripts become plain ones); ``lower`` case;
    typographic apostrophes become ``'``; with ``strip_punctuation`` every character of the Unicode classes P
    (punctuation) and S (symbols, also $ + %) becomes a space, so "twenty-one" is two words, except, with
    ``keep_apostrophe``, an apostrophe between two letters ("don't"); control and format characters and the word
    boundary symbol become spaces; runs of white space become one space and none stays at the ends.

    Digits stay digits ("3" is not "three"), accents stay, and nothing in brackets is taken for a noise mark.
    """

    lower: bool = True
    strip_punctuation: bool = True
    keep_apostrophe: bool = True

    def normalise(self, text: str) -> str:
        """Return the text by these rules; normalising twice is normalising once."""
        text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
        if self.lower:
            # lower-casing can make a sequence that NFKC writes otherwise, and the other way round
            text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.lower()).lower())
        text = text.translate(_APOSTROPHES)
        kept = [char if self._stays(text, at, char) else " " for at, char in enumerate(text)]
        return " ".join("".join(kept).split())

    def _stays(self, text: str, at: int, char: str) -> bool:
        if char == BOUNDARY:
            return False
        kind = unicodedata.category(char)
        if kind[0] == "C":
            return False
        if not self.strip_punctuation or kind[0] not in "PS":
            return True
        return char == "'" and self.keep_apostrophe and _letter(text[at - 1 : at]) and _letter(text[at + 1 : at + 2])


def _letter(char: str) -> bool:
    return bool(char) and unicodedata.category(char)[0] in "LM"


def words(text: str) -> list[str]:
    """Return the words of a text: what stands between white space."""
    return text.split()
