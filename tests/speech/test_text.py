"""Normalisation does what its docstring states, and doing it twice changes nothing."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.speech.text import BOUNDARY, TextRules, words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  Yes,\tNO!\n", "yes no"),
        ("twenty-one", "twenty one"),
        ("don’t 'quote' rock 'n' roll dogs'", "don't quote rock n roll dogs"),
        ("ＦＵＬＬ ﬁne x²", "full fine x2"),
        ("ÉTÉ Straße", "été straße"),
        ("3 dollars = $3 + 5%", "3 dollars 3 5"),
        ("a\u200bb\u00a0c", "a b c"),
        (f"yes{BOUNDARY}no", "yes no"),
        ("...", ""),
        ("नमस्ते", "नमस्ते"),
        # joiners are letters' own; what shows nothing parts nothing
        ("ශ්\u200dරී ලංකා", "ශ්\u200dරී ලංකා"),
        ("র\u200d্যাব", "র\u200d্যাব"),
        ("می\u200cخواهم\u200c.", "می\u200cخواهم"),
        ("Donau\u00addampf \ufeff\u200fשלום\u200e", "donaudampf שלום"),
        ("a\u200d, b\u200d\u200c", "a b"),
        ("צה״ל ג׳ורג׳", "צה״ל ג׳ורג"),
        ("col·lecció a·b 卡尔·马", "col·lecció a b 卡尔 马"),
    ],
)
def test_examples(text: str, wanted: str) -> None:
    assert TextRules().normalise(text) == wanted


def test_every_rule_can_be_switched_off() -> None:
    text = "Don't, STOP"
    assert TextRules(lower=False).normalise(text) == "Don't STOP"
    assert TextRules(strip_punctuation=False).normalise(text) == "don't, stop"
    assert TextRules(keep_apostrophe=False).normalise(text) == "don t stop"


@given(text=st.text(), lower=st.booleans(), strip=st.booleans(), keep=st.booleans())
def test_twice_is_once(text: str, lower: bool, strip: bool, keep: bool) -> None:
    rules = TextRules(lower, strip, keep)
    once = rules.normalise(text)
    assert rules.normalise(once) == once
    assert once == " ".join(words(once)) and BOUNDARY not in once
    if strip:
        assert all(char in "'׳״·\u200c\u200d" or unicodedata.category(char)[0] not in "PSC" for char in once)


@given(text=st.text(st.sampled_from("aé=l·'.\u0301\u0338\u200b\u200c\u200d\u00ad\u037a ")), strip=st.booleans())
def test_twice_is_once_around_joiners(text: str, strip: bool) -> None:
    rules = TextRules(strip_punctuation=strip)
    once = rules.normalise(text)
    assert rules.normalise(once) == once and "\u00ad" not in once
