"""Sentences of a speech interface to simulate: commands, digits, spelled words, numbers, dates and addresses.

Lower case a to z and single spaces only. The kinds are those of the AN4 recordings (a census and a word processor run
by voice); the grammar and its word lists are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"),
    *("twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth"),
    *("twentieth", "thirtieth"),
)
COMMANDS = ("yes", "no", "go", "stop", "start", "help", "repeat", "enter", "erase", "rubout")
# spelled letter by letter; half of the spelled words are random letters instead, so that no word can be guessed
NAMES = (
    *("aaron", "alice", "amanda", "angela", "beatrice", "brian", "carla", "charles", "claire", "daniel", "deborah"),
    *("edward", "elizabeth", "felix", "florence", "gabriel", "george", "hannah", "henry", "isabel", "jacob", "james"),
    *(
        "katherine",
        "kevin",
        "laura",
        "lewis",
        "margaret",
        "maxwell",
        "nancy",
        "oliver",
        "patricia",
        "quentin",
        "rachel",
    ),
    *("raymond", "samuel", "susan", "thomas", "ursula", "victor", "wendy", "xavier", "yvonne", "zachary"),
    *("austin", "boston", "chicago", "dallas", "denver", "houston", "memphis", "phoenix", "portland", "seattle"),
    *("baxter", "chung", "fitzgerald", "gomez", "jackson", "kowalski", "mcbride", "nguyen", "quigley", "vazquez"),
)
# what a synthesiser is to be given for a word that it would read as another one: the letter "a" is not the article
SPOKEN = {"a": "[['eI]]", "rubout": "rub out"}

_AVOIDED = ("ass", "cum", "cun", "dic", "fag", "fuc", "fuk", "kkk", "nig", "shi", "tit")


def sentence(generator: np.random.Generator) -> str:
    """Return one sentence, 1 to some 12 words; the kinds come with the weights of ``KINDS``."""
    limits = np.cumsum([weight for weight, _ in KINDS])
    _, kind = KINDS[int(np.searchsorted(limits, generator.integers(limits[-1]), side="right"))]
    return " ".join(kind(generator))


def spoken(text: str) -> str:
    """Return ``text`` as espeak-ng reads it right: ``a`` as the letter, by its phoneme."""
    return " ".join(SPOKEN.get(word, word) for word in text.split())


def vocabulary() -> frozenset[str]:
    """Return every word a sentence can hold."""
    words = (*LETTERS, *DIGITS, *TEENS, *TENS, *MONTHS, *ORDINALS, *COMMANDS)
    return frozenset((*words, "oh", "hundred", "thousand", "and", "area", "code"))


def cardinal(value: int, *, with_and: bool = False) -> list[str]:
    """Return the words of a number from 0 to 999,999; ``with_and`` says "two hundred and six".

    Raises: ValueError outside this range.
    """
    if not 0 <= value < 1_000_000:
        raise ValueError(f"value: got {value}, wanted 0 to 999,999")
    if value >= 1000:
        rest = value % 1000
        return [*cardinal(value // 1000), "thousand", *(cardinal(rest, with_and=with_and) if rest else [])]
    if value >= 100:
        rest = value % 100
        return [
            DIGITS[value // 100],
            "hundred",
            *(["and"] if with_and and rest else []),
            *(_below(rest) if rest else []),
        ]
    return _below(value)


def ordinal(day: int) -> list[str]:
    """Return the words of a day of the month, 1 to 31: 23 is "twenty third".

    Raises: ValueError outside this range.
    """
    if not 1 <= day <= 31:
        raise ValueError(f"day: got {day}, wanted 1 to 31")
    if day <= 20:
        return [ORDINALS[day - 1]]
    if day == 30:
        return ["thirtieth"]
    return [TENS[day // 10 - 2], ORDINALS[day % 10 - 1]]


def _below(value: int) -> list[str]:
    """Return the words of a number below 100."""
    if value < 10:
        return [DIGITS[value]]
    if value < 20:
        return [TEENS[value - 10]]
    return [TENS[value // 10 - 2], *([DIGITS[value % 10]] if value % 10 else [])]


def _pick(generator: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(generator.integers(len(words)))]


def _digits(generator: np.random.Generator, count: int) -> list[str]:
    """Return ``count`` digits; a speaker says either "oh" or "zero" throughout."""
    nought = "oh" if generator.random() < 0.7 else "zero"
    return [DIGITS[value] if value else nought for value in generator.integers(10, size=count).tolist()]


def _letters(generator: np.random.Generator, low: int, high: int) -> list[str]:
    """Return ``low`` to ``high`` random letters, not those that begin a word one would not want to read."""
    while True:
        drawn = generator.integers(26, size=int(generator.integers(low, high + 1))).tolist()
        letters = [LETTERS[index] for index in drawn]
        if not any(part in "".join(letters) for part in _AVOIDED):
            return letters


def _number(generator: np.random.Generator) -> list[str]:
    """Return a number of one to five digits, each length as often as the others."""
    size = int(generator.integers(1, 6))
    value = int(generator.integers(10 ** (size - 1) if size > 1 else 0, 10**size))
    return cardinal(value, with_and=bool(generator.random() < 0.2))


def _pairs(generator: np.random.Generator) -> list[str]:
    """Return a house number as people read it: "thirty two thirty one"."""
    return [*_below(int(generator.integers(10, 100))), *_below(int(generator.integers(10, 100)))]


def _command(generator: np.random.Generator) -> list[str]:
    return [_pick(generator, COMMANDS[:7])]


def _enter(generator: np.random.Generator) -> list[str]:
    return ["enter", *_number(generator)]


def _edit(generator: np.random.Generator) -> list[str]:
    tail = _number(generator) if generator.random() < 0.5 else _below(int(generator.integers(100)))
    return [_pick(generator, ("erase", "rubout", "repeat")), *_letters(generator, 2, 6), *tail]


def _code(generator: np.random.Generator) -> list[str]:
    return [*_letters(generator, 2, 6), *_digits(generator, int(generator.integers(1, 5)))]


def _spelled(generator: np.random.Generator) -> list[str]:
    return list(_pick(generator, NAMES)) if generator.random() < 0.5 else _letters(generator, 3, 9)


def _digit_string(generator: np.random.Generator) -> list[str]:
    return _digits(generator, int(generator.integers(1, 8)))


def _phone(generator: np.random.Generator) -> list[str]:
    area = ["area", "code", *_digits(generator, 3)] if generator.random() < 0.1 else []
    return [*area, *_digits(generator, 7)]


def _date(generator: np.random.Generator) -> list[str]:
    month, day, year = int(generator.integers(12)), int(generator.integers(1, 32)), int(generator.integers(10, 100))
    style = generator.random()
    if style < 0.4:
        return [MONTHS[month], *ordinal(day), *(["nineteen", *_below(year)] if generator.random() < 0.6 else [])]
    if style < 0.7:
        return [*_below(month + 1), *_below(day), *_below(year)]
    abbreviation = list(MONTHS[month][:3])
    return [*abbreviation, *(DIGITS[int(figure)] for figure in str(day)), "nineteen", *_below(year)]


# (weight, kind): spelling and digits weigh most, since nothing but the sound tells them apart
KINDS: tuple[tuple[int, Callable[[np.random.Generator], list[str]]], ...] = (
    *((10, _command), (12, _enter), (12, _edit), (12, _code), (22, _spelled)),
    *((14, _digit_string), (6, _phone), (4, _number), (3, _pairs), (8, _date)),
)
