"""What is done to a transcript before it is compared or encoded. No torch."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

BOUNDARY = "▁"
# what keyboards and books write for an apostrophe
_APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼ＇`´"), "'")
# what shows nothing and parts nothing: the soft hyphen, marks of direction, joiners of words
_UNSEEN = dict.fromkeys(
    [0xAD, 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF], ""
)
# zero-width non-joiners and joiners, which belong to the spelling of Persian, Bengali or Sinhala
_JOINERS = re.compile("([\u200c\u200d]+)")
# in a word like the apostrophe: Hebrew's geresh and gershayim
_WITHIN = "'\u05f3\u05f4"


@dataclass(frozen=True)
class TextRules:
    """How transcripts are normalised.

    In this order: Unicode NFKC (full-width letters, ligatures and superscripts become plain ones); ``lower`` case;
    typographic apostrophes become ``'``; with ``strip_punctuation`` every character of the Unicode classes P
    (punctuation) and S (symbols, also $ + %) becomes a space, so "twenty-one" is two words, except, with
    ``keep_apostrophe``, an apostrophe between two letters ("don't"), Hebrew's geresh and gershayim there, and the dot
    of Catalan's "l·l"; soft hyphens and marks of direction go, and zero-width joiners and non-joiners too but between
    two letters; other control and format characters and the word boundary symbol become spaces; runs of white space
    become one space and none stays at the ends.

    Digits stay digits ("3" is not "three"), accents stay, and nothing in brackets is taken for a noise mark.
    """

    lower: bool = True
    strip_punctuation: bool = True
    keep_apostrophe: bool = True

    def normalise(self, text: str) -> str:
        """Return the text by these rules; normalising twice is normalising once."""
        once = self._normalised(text)
        # without a joiner there may be a pair that NFKC writes as one character
        while _JOINERS.search(text) and (again := self._normalised(once)) != once:
            once = again
        return once

    def _normalised(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES | _UNSEEN))
        if self.lower:
            # lower-casing can make a sequence that NFKC writes otherwise, and the other way round
            text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.lower()).lower())
        text = text.translate(_APOSTROPHES)
        kept = "".join(char if self._stays(text, at, char) else " " for at, char in enumerate(text))
        parts = _JOINERS.split(kept)
        for at in range(1, len(parts), 2):
            if not (_letter(parts[at - 1][-1:]) and _letter(parts[at + 1][:1])):
                parts[at] = ""
        return " ".join("".join(parts).split())

    def _stays(self, text: str, at: int, char: str) -> bool:
        if char == BOUNDARY:
            return False
        kind = unicodedata.category(char)
        if kind[0] == "C":
            return _JOINERS.match(char) is not None
        if not self.strip_punctuation or kind[0] not in "PS":
            return True
        before, after = text[at - 1 : at], text[at + 1 : at + 2]
        if char == "·":
            return self.keep_apostrophe and before in ("l", "L") and after in ("l", "L")
        return char in _WITHIN and self.keep_apostrophe and _letter(before) and _letter(after)


def _letter(char: str) -> bool:
    return bool(char) and unicodedata.category(char)[0] in "LM"


def words(text: str) -> list[str]:
    """Return the words of a text: what stands between white space."""
    return text.split()
